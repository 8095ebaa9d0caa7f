"""The table of layouts: how the keys of other people's checkpoint files are arranged, and which layout a file has.

Nothing else in the project knows the name of a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from checkpoints.trunk import has_convolution
from models.teachers import IMAGENET_MEAN, IMAGENET_STD

Colours = Sequence[float]
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MOCO_V3_ARCHS = {"vit_small": "vit_s_16_12h", "vit_base": "vit_b_16"}
CLIP_TEXT = ("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
             "logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size")
TRANSFORMERS = {"vit.": "ViT, ViT-MAE, MSN and DINO", "dinov2.": "DINOv2", "dinov2_with_registers.":
                "DINOv2 with registers", "dinov3_vit.": "DINOv3", "ijepa.": "I-JEPA", "model.": "DINOv3"}


@dataclass(frozen=True)
class Layout:
    """How the keys of a file are arranged, after the container is opened and wrappers are removed.

    ``prefix`` precedes the keys of the trunk that the method's own evaluation uses, ``branches`` precede other trunks
    in the same file. ``head`` are prefixes of the head, in which ``*`` stands for the branch's prefix; ``dropped`` are
    prefixes of everything else. All match only at the start of a key. A file has the first layout of the table whose
    ``signs`` are all present (one is enough of those separated by ``|``) and that has convolutions under its prefix.
    ``mean`` and ``std`` are the normalisation that the network was trained with, for images in [0, 1].
    """

    name: str
    prefix: str
    reads: str
    head: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    mean: Colours = IMAGENET_MEAN
    std: Colours = IMAGENET_STD
    cifar_stem: str = "cifar"
    archs: Mapping[str, str] = field(default_factory=dict)  # names that its files record -> ours
    own: Mapping[str, tuple[Colours, Colours]] = field(default_factory=dict)  # mean and std of single architectures
    authors: str = ""  # the prefix that timm's converter expects for the branch
    elsewhere: tuple[str, ...] = ()  # tensors without the prefix that belong to the branch: CLIP's projection


LAYOUTS = (
    Layout("DisCo", "encoder_q.", "DisCo students", ("*fc.", "*classifier."),
           ("encoder_k.", "teacher_encoder_q.", "teacher_encoder_k."), ("queue", "teacher_queue"),
           signs=("teacher_encoder_q.",)),
    Layout("OpenSelfSup", "encoder_q.0.", "OpenSelfSup and early mmselfsup MoCo", ("encoder_q.1.",),
           ("encoder_k.0.", "backbone."), ("encoder_k.", "queue", "neck.", "head."), signs=("encoder_q.0.",)),
    Layout("MoCo", "encoder_q.", "MoCo v1 and v2, AdCo, CLSA, SEED's released students, BINGO students (their "
           "encoder_k is the teacher), train_teacher.py", ("*fc.", "*classifier."), ("encoder_k.",),
           ("queue", "memory_bank")),
    Layout("MoCo v3", "base_encoder.", "MoCo v3, ResNet-50 and ViT", ("*fc.", "*head."), ("momentum_encoder.",),
           ("predictor.",), archs=MOCO_V3_ARCHS),
    Layout("DINO", "teacher.backbone.", "DINO's full checkpoints, ResNet-50 and ViT, iBOT's, DINOv2's and DINOv3's "
           "training files", ("teacher.head.", "teacher.dino_head."), ("student.backbone.",),
           ("student.", "teacher.", "dino_loss.", "ibot_", "gram_")),
    Layout("CLIP (timm's trunk)", "visual.trunk.", "OpenCLIP, SigLIP and EVA-CLIP whose image half is timm's",
           ("visual.head.",), dropped=CLIP_TEXT),
    Layout("CLIP", "visual.", "OpenAI's CLIP (saved as a state dict) and OpenCLIP, EVA-CLIP", ("visual.head.",),
           dropped=CLIP_TEXT, signs=("visual.transformer. | visual.blocks.",), authors="visual."),
    Layout("CLIP (image half)", "", "the image half of CLIP alone", signs=("class_embedding", "transformer.resblocks."),
           authors="visual."),
    Layout("transformers (CLIP, SigLIP)", "vision_model.", "CLIP's and SigLIP's model.safetensors of Hugging Face "
           "transformers", ("visual_projection.",), dropped=("text_model.", "text_projection.", "logit_scale",
           "logit_bias", "*embeddings.position_ids"), signs=("vision_model.embeddings.",),
           elsewhere=("visual_projection.weight",)),
    *(Layout(f"transformers ({prefix[:-1]})", prefix, reads, ("classifier.", "*pooler."), dropped=("decoder.",),
             signs=(f"{prefix}embeddings.",)) for prefix, reads in TRANSFORMERS.items()),
    Layout("transformers", "", "transformers' DINOv2, DINOv3, ViT, ViT-MAE, MSN, I-JEPA, CLIP and SigLIP, alone",
           ("pooler.", "classifier."), dropped=("embeddings.position_ids",), signs=("embeddings.patch_embedding",)),
    Layout("I-JEPA, MSN", "target_encoder.", "I-JEPA and MSN", ("*fc.",), ("encoder.",),
           ("predictor.", "prototypes", "encoder.", "opt.", "scaler."), signs=("target_encoder.",)),
    Layout("MAE", "", "MAE with its decoder", dropped=("decoder_",), signs=("decoder_embed.", "cls_token")),
    Layout("RADIO", "radio_model.", "RADIO of Hugging Face", dropped=("input_conditioner.", "summary_idxs"),
           signs=("radio_model.model.patch_generator.",), authors="radio_model."),
    Layout("SEED", "student.", "SEED students from its own training", ("*fc.", "*classifier."), ("teacher.",),
           ("queue",)),
    Layout("mmselfsup", "backbone.", "mmselfsup 0.x, 1.x and mmpretrain", ("neck.",),
           ("encoder_k.module.0.", "encoder_k.0.", "target_net.module.0.", "target_net.0.",
            "momentum_encoder.module.0.", "momentum_encoder.0.", "momentum_encoder.", "teacher.module.0."),
           ("encoder_k.", "encoder_q.", "target_net.", "online_net.", "momentum_encoder.", "teacher.", "head.", "queue",
            "data_preprocessor."), signs=("neck.", "backbone.")),
    Layout("SimCLR (PyTorch)", "backbone.", "sthalles' SimCLR", ("*fc.",), signs=("backbone.fc.0.", "backbone.fc.2."),
           **UNIT),
    Layout("solo-learn", "backbone.", "solo-learn", ("projector.",), ("momentum_backbone.",),
           ("classifier.", "momentum_classifier.", "momentum_projector.", "predictor.", "prototypes.", "head.",
            "momentum_head.", "queue", "_"), signs=("backbone.", "classifier. | momentum_backbone."),
           cifar_stem="cifar_pad2"),
    Layout("solo-learn (old)", "encoder.", "solo-learn before 1.0.3", ("projector.",), ("momentum_encoder.",),
           ("classifier.", "momentum_classifier.", "momentum_projector.", "predictor.", "prototypes.", "head.",
            "momentum_head.", "queue", "_"), signs=("encoder.", "classifier. | momentum_encoder. | projector."),
           cifar_stem="cifar_pad2"),
    Layout("Barlow Twins, VICReg", "backbone.", "Barlow Twins checkpoint.pth, VICReg model.pth", ("projector.",),
           dropped=("bn.",), signs=("backbone.", "projector.")),
    Layout("lightly", "backbone.", "lightly, its backbone named or positional", ("projection_head.",),
           ("backbone_momentum.", "student_backbone.", "teacher_backbone."),
           ("projection_head_momentum.", "prediction_head.", "student_projection_head.", "student_prediction_head.",
            "prototypes.", "criterion.", "memory_bank.", "online_classifier.", "queue"),
           signs=("backbone.", "projection_head.")),
    Layout("lightly (positional)", "backbone.", "lightly's backbone alone, as nn.Sequential", signs=(
        "backbone.0.weight", "backbone.4.")),
    Layout("lightly (student and teacher)", "teacher_backbone.", "lightly's DINO", ("teacher_head.",),
           ("student_backbone.",), ("student_head.", "criterion.")),
    *(Layout(f"lightly-train ({inner})", f"student_embedding_model.wrapped_model.{inner}.",
             "lightly-train's training checkpoints", branches=(f"teacher_embedding_model.wrapped_model.{inner}.",),
             dropped=("student_", "teacher_", "criterion.", "queue")) for inner in ("_features", "_model")),
    Layout("CoSS", "backbone.", "CoSS students, the original's and those of train_distill.py; any backbone.*",
           ("proj_head.", "*fc."), dropped=("loss.", "head.", "queue")),
    Layout("SimSiam", "encoder.", "SimSiam", ("*fc.",), dropped=("predictor.",), signs=("predictor.",)),
    Layout("VISSL", "trunk._feature_blocks.", "VISSL training files", branches=("trunk.base_model._feature_blocks.",),
           dropped=("heads.",)),
    Layout("VISSL (wrapped)", "trunk.base_model._feature_blocks.", "VISSL evaluation files", dropped=("heads.",)),
    Layout("VISSL (converted, wrapped)", "base_model._feature_blocks.", "VISSL after its conversion script"),
    Layout("VISSL (converted)", "_feature_blocks.", "VISSL after its conversion script", dropped=("heads.",)),
    Layout("SMD", "encoder.", "SMD students; any encoder.*", ("*fc.",)),
    Layout("SwAV, DeepCluster-v2", "", "SwAV and DeepCluster-v2, released and training files", ("projection_head.",),
           dropped=("prototypes.",), signs=("projection_head.", "prototypes."), std=(0.228, 0.224, 0.225)),
    Layout("detectron2", "", "detectron2 pickles", ("stem.fc.",), signs=("stem.conv1.",)),
    Layout("model.*", "model.", "Lightning modules that call their network model", signs=("model.",)),
    Layout("SimCLR (converted)", "", "Google's SimCLR by simclr-converter", ("fc.",),
           signs=("layer2.0.downsample. < layer2.0.conv1.",), **UNIT),
    Layout("plain", "", "torchvision, timm, DINO *_pretrain, Barlow Twins and VICReg resnet50.pth, BYOL "
           "(converted), SEED's SimCLR teacher, efficientnet_pytorch, linear-probe files, export.py", ("fc.", "_fc.",
           "head."), archs=MOCO_V3_ARCHS,
           own={"googlenet": HALF, "inception_v3": HALF, "efficientnet_v2_l": HALF}),
)


def find_layout(tensors: dict[str, Tensor]) -> Layout | None:
    """The first layout of the table all of whose signs are present."""
    return next((layout for layout in LAYOUTS if _matches(layout, tensors)), None)


def _matches(layout: Layout, tensors: dict[str, Tensor]) -> bool:
    for sign in layout.signs:
        if " | " in sign:
            if not any(k.startswith(tuple(sign.split(" | "))) for k in tensors):
                return False
            continue
        first, _, then = sign.partition(" < ")
        places = [next((i for i, k in enumerate(tensors) if k.startswith(p)), None) for p in (first, then or first)]
        if None in places or places[0] > places[1]:
            return False
    return has_convolution(tensors, layout.prefix)
