"""Reading checkpoint files by a table of layouts: which layout a file has, and which of its tensors are the trunk.

Nothing else in the project knows the name of a key. Matching is strict both ways: every tensor of the trunk must be
filled, and there may be no unexpected keys that could belong to a trunk. (ResNet-34 weights fill a ResNet-18
completely, so filling alone proves nothing.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints.by_name import locate
from checkpoints.hugging_face import read_folder, weight_files
from checkpoints.match import Checkpoint, Layout
from checkpoints.report import few
from checkpoints.safe_load import read_file
from checkpoints.trunk import has_convolution
from models.backbones import STEMS
from runtime.errors import Damaged, UserError
from runtime.inert import Inert
from runtime.own import is_own
from runtime.store import check_content

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put these in front
CONTAINERS = ("state_dict", "model_state_dict", "classy_state_dict.base_model.model", "model", "module")  # DeepSpeed's
TRAINING_STATE = ("optimizer", "scaler", "lr_scheduler", "scheduler", "loss", "fp16_scaler", "amp", "updater", "args")
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MOCO_V3_ARCHS = {"vit_small": "vit_s_16_12h", "vit_base": "vit_b_16"}
CLIP_TEXT = ("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
             "logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size")
TRANSFORMERS = {"vit.": "ViT, ViT-MAE, MSN and DINO", "dinov2.": "DINOv2", "dinov2_with_registers.":
                "DINOv2 with registers", "dinov3_vit.": "DINOv3", "ijepa.": "I-JEPA", "model.": "DINOv3"}

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
    Layout("torchvision", "", "torchvision, timm, DINO *_pretrain, Barlow Twins and VICReg resnet50.pth, BYOL "
           "(converted), SEED's SimCLR teacher, efficientnet_pytorch, linear-probe files, export.py", ("fc.", "_fc.",
           "head."), archs=MOCO_V3_ARCHS,
           own={"googlenet": HALF, "inception_v3": HALF, "efficientnet_v2_l": HALF}),
)


def read_checkpoint(path: str | Path, key: str | None = None, flag: str = "--weights", *, branch: str | None = None,
                    branch_flag: str = "--branch", trust: bool = False) -> Checkpoint:
    """Read ``path`` and find its layout. It is a file, a Hugging Face folder or a name (:mod:`checkpoints.by_name`);
    no code from it is run.

    ``key`` names the container within the file (dots separate levels), ``branch`` selects one of several trunks, and
    ``trust`` allows unpickling, which runs code from the file.
    """
    path, arch = locate(path, flag)
    files = weight_files(path, flag) if path.is_dir() else [path]
    raw = read_folder(path, files, flag, trust) if path.is_dir() else read_file(path, flag, trust)
    if not isinstance(raw, dict):
        raise UserError(f"{flag} {path} holds a {type(raw).__name__}, expected a dictionary of tensors")
    try:
        check_content(raw)
    except Damaged as error:
        raise UserError(f"{flag} {path} is damaged ({error}); copy it again, or, if its tensors were changed on "
                        "purpose, save it without its entry checksum") from None
    everything, raw = _flatten(raw), dict(dict.items(raw))
    if not everything:
        if whole := [f"{k} ({type(v).__module__}.{type(v).__name__})" for k, v in raw.items() if isinstance(v, Inert)]:
            raise UserError(f"{flag} {path} holds no tensors, only pickled objects ({few(whole)}), expected a state "
                            "dict; save its state_dict() and give that, or, if you trust where it comes from, add "
                            "--trust-checkpoint")
        raise UserError(f"{flag} {path} holds no tensors, only {few(list(map(str, raw)))}; "
                        "give a checkpoint with a state_dict")
    container, tensors = _open_container(everything, raw, path, key)
    outside: dict[str, int] = {}
    for name in everything.keys() - {container + k for k in tensors}:
        outside[name.partition(".")[0]] = outside.get(name.partition(".")[0], 0) + 1
    layout = find_layout(tensors)
    if layout is None and is_own(raw.get("arch")):  # without a convolution
        layout = next(x for x in LAYOUTS if x.name == "CoSS")
    if layout is None:
        raise UserError(f"{flag} {path} holds no image backbone, its tensors are {few(list(tensors))}; "
                        "give the file of the pretrained network itself")
    checkpoint = Checkpoint(path, flag, layout, container.rstrip("."), layout.prefix, tensors, outside,
                            {**_meta(raw), **({"arch": arch} if arch else {})}, tuple(files))
    if branch is None:
        return checkpoint
    prefix = branch.rstrip(".") + "."
    if prefix not in checkpoint.branches() and has_convolution(tensors, prefix):
        others = sorted({k.partition(".")[0] for k in tensors if not k.startswith(prefix)})
        return dataclasses.replace(checkpoint, prefix=prefix, layout=Layout(
            f"{branch_flag} {branch}", prefix, "", ("*fc.", "*head.", "*classifier."), dropped=tuple(others)))
    if prefix not in checkpoint.branches():
        there = [p.rstrip(".") for p in checkpoint.branches() if p]
        raise UserError(f"{branch_flag} {branch} is not in {path}; it holds "
                        + (f"{', '.join(there)}" if there else "one trunk without a prefix, so omit the flag"))
    return dataclasses.replace(checkpoint, prefix=prefix)


def find_layout(tensors: dict[str, Tensor]) -> Layout | None:
    """The first layout of the table all of whose signs are present."""
    return next((layout for layout in LAYOUTS if _matches(layout, tensors)), None)


def _flatten(raw: dict[Any, Any], above: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Every tensor and numeric array of nested dictionaries under its dotted path, without wrappers at any level."""
    tensors: dict[str, Tensor] = {}
    for name, value in dict.items(raw):  # dict's own method: a file can give its dictionaries attributes
        name = _strip_wrappers(str(name))
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.dtype.itemsize <= 8:
            value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
        if isinstance(value, nn.Module):  # only from a trusted file
            value = value.state_dict()
        if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            tensors[name] = Tensor.detach(value)  # without attributes and gradients
        elif isinstance(value, dict) and id(value) not in above:  # a pickle can hold a dictionary that holds itself
            tensors.update((f"{name}.{inner}", x) for inner, x in _flatten(value, (*above, id(value))).items())
    return tensors


def _open_container(everything: dict[str, Tensor], raw: dict[str, Any], path: Path,
                    key: str | None) -> tuple[str, dict[str, Tensor]]:
    """The path of the container followed by a dot, or '' for a bare file, and its tensors."""
    def inside(name: str) -> dict[str, Tensor]:
        return {k[len(name) + 1:]: v for k, v in everything.items() if k.startswith(name + ".")}

    if key is not None:
        if tensors := inside(key):
            return key + ".", tensors
        if not any(isinstance(v, Tensor) for v in raw.values()):  # like the original, read a bare file without the key
            entries = [str(k) for k, v in raw.items() if isinstance(v, dict)] or [str(k) for k in raw]
            raise UserError(f"--checkpoint-key {key} is not in {path}; it holds {few(entries, 8)}")
    else:
        for name in CONTAINERS:
            holds = raw.get(name.partition(".")[0])
            if isinstance(holds, Mapping) and (tensors := inside(name)):
                return name + ".", tensors
    return "", {k: v for k, v in everything.items() if k.partition(".")[0] not in TRAINING_STATE}


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


def _meta(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the file records about its network, as far as it is useful here."""
    inner = raw.get("meta")  # mmengine
    epoch = raw.get("epoch", inner.get("epoch") if isinstance(inner, Mapping) else None)
    colours = {name: raw[name] for name in ("mean", "std")
               if isinstance(raw.get(name), list | tuple) and len(raw[name]) == 3}
    arch = raw.get("arch", getattr(raw.get("args"), "arch", None))  # DINO's lies in its arguments
    meta = {"arch": arch, "stem": raw.get("stem"), "image_size": raw.get("image_size"),
            "feature": raw.get("feature"), "epoch": epoch, "hidden_act": raw.get("hidden_act"),
            "heads": raw.get("heads"), "code_sha256": raw.get("code_sha256")}
    kinds = {"arch": str, "stem": str, "image_size": int, "feature": str, "epoch": int, "hidden_act": str, "heads": int,
             "code_sha256": str}
    meta = {name: value for name, value in meta.items() if isinstance(value, kinds[name])}
    if meta.get("stem") not in (None, *STEMS):
        del meta["stem"]
    teacher = raw.get("teacher")  # the report of our own students', as opposed to DINO's weights
    if isinstance(teacher, dict) and isinstance(teacher.get("sha256"), str):
        meta["teacher"] = teacher
    return {**meta, **colours}


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")  # a part alone was compiled
