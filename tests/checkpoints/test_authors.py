"""Files as today's teachers' authors name them: the network is found from names and shapes, at its released size.

A small network of each, two blocks of 64 channels, gives the features of timm's own, at its image size and at another.
What timm's converters compute is timm's; that each is reached, and that nothing is lost on the way, is checked here.
"""

from pathlib import Path

import pytest
import torch
from helpers import authors
from helpers.authors import FILES
from helpers.sources import (
    _no_initialisation,  # noqa: F401
    images,
    randomise,
    under,
)

from checkpoints.frozen import load_frozen
from checkpoints.identify import Identity, hollow_trunk
from checkpoints.layouts import LAYOUTS, TRANSFORMERS, find_layout
from checkpoints.match import Checkpoint
from checkpoints.reader import read_checkpoint
from checkpoints.timm_names import converter
from models.backbones import Spec
from runtime.errors import UserError

timm = pytest.importorskip("timm", reason="these networks are timm's; pip install timm")


def hollow(name):
    model = hollow_trunk(Identity(f"timm:{name}", "imagenet", 224))
    return {key: torch.empty(value.shape, device="meta") for key, value in model.state_dict().items()}


HUGE = ("DINOv2, giant", "EVA-CLIP, giant", "I-JEPA")  # whose released sizes take long to build


LAYOUTS_BY_NAMES = {  # those that FILES leaves out; names -> layout, its prefix
    "CLIP (image half)": (("class_embedding", "conv1.weight", "transformer.resblocks.0.ln_1.weight"), ""),
    "MAE": (("cls_token", "patch_embed.proj.weight", "decoder_embed.weight", "mask_token"), ""),
    "I-JEPA, MSN": (("encoder.patch_embed.proj.weight", "target_encoder.patch_embed.proj.weight"), "target_encoder."),
    "transformers": (("embeddings.patch_embeddings.projection.weight", "pooler.dense.weight"), ""),
    "transformers (CLIP, SigLIP)": (("vision_model.embeddings.patch_embedding.weight", "text_model.a"),
                                    "vision_model."),
    **{f"transformers ({prefix[:-1]})": ((f"{prefix}embeddings.patch_embeddings.projection.weight",), prefix)
       for prefix in TRANSFORMERS},
}


@pytest.mark.parametrize("name", LAYOUTS_BY_NAMES)
def test_layout(name):
    names, prefix = LAYOUTS_BY_NAMES[name]
    found = find_layout({key: torch.empty(8, 3, 4, 4) for key in names})
    assert (found.name, found.prefix) == (name, prefix)


def test_every_layout_of_transformers_is_there():
    theirs = ("CLIP", "transformers", "I-JEPA", "MAE", "RADIO")
    listed = {layout.name for layout in LAYOUTS if layout.name.startswith(theirs)}
    assert listed == {*LAYOUTS_BY_NAMES, "CLIP", "CLIP (timm's trunk)", "RADIO"}


def checkpoint_of(tensors):
    layout = find_layout(tensors)
    return Checkpoint(Path("file"), "--distill", layout, "", layout.prefix, tensors, {}, {})


@pytest.mark.parametrize("family", [name for name in FILES if name not in HUGE and name != "BEiT"])
def test_found(family):
    row = FILES[family]
    found = checkpoint_of(row.names(hollow(row.network))).identify()
    assert (found.arch, found.image_size) == (f"timm:{row.network}", 224)


@pytest.mark.parametrize("family", FILES)
def test_features(family, tmp_path):
    row = FILES[family]

    def shrunk(size):
        sized = {} if "dims" in row.options else {"img_size": size}
        model = timm.create_model(row.network, num_classes=0, **row.options, **sized).eval()
        model.spec = Spec(f"timm:{row.network}", "imagenet", size, 64, "head")
        return model

    theirs = randomise(shrunk(row.sizes[0]))
    given = row.names({name: value.clone() for name, value in theirs.state_dict().items()})
    torch.save(given, tmp_path / "file.pth")
    for size in row.sizes:
        ours = shrunk(size)
        read_checkpoint(tmp_path / "file.pth").load_into(ours)
        if family == "RADIO":  # as its authors place a table of 128 x 128 on any number of patches
            table = given["radio_model.model.patch_generator.pos_embed"].unflatten(1, (128, 128)).permute(0, 3, 1, 2)
            fitted = torch.nn.functional.interpolate(table, (size // 16,) * 2, mode="bilinear", align_corners=True)
            theirs = shrunk(size)
            theirs.load_state_dict({**ours.state_dict(), "pos_embed": fitted.flatten(2).transpose(1, 2)})
        elif size != row.sizes[0] and "img_size" not in row.options and hasattr(theirs, "set_input_size"):
            theirs.set_input_size(img_size=size)  # resamples as timm does
        with torch.no_grad():
            expected = theirs(images(size))
            assert (ours(images(size)) - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert expected.std(dim=0).max() > 1e-3  # the images matter


@pytest.mark.parametrize(("given", "archs"), [
    (lambda: authors.openclip(hollow("vit_base_patch32_clip_224")),
     "timm:vit_base_patch32_clip_224.laion2b, timm:vit_base_patch32_clip_quickgelu_224.openai"),
    (lambda: authors.beit(hollow("beit_base_patch16_224")),
     "timm:beit_base_patch16_224.in22k_ft_in22k, timm:beitv2_base_patch16_224.in1k_ft_in22k")])
def test_what_no_name_tells_apart_is_listed(given, archs):
    with pytest.raises(UserError) as caught:
        checkpoint_of(given()).identify(arch_flag="--teacher-arch")
    assert f"fits {archs}, which " in str(caught.value)
    assert "give --teacher-arch with the one that it is" in str(caught.value)


@pytest.fixture(scope="module")
def small():
    """DINOv2's ViT-S with registers, in its authors' names, with the positions of 112 pixels."""
    model = randomise(timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=112))
    tensors = authors.dinov2({k: v.clone() for k, v in model.state_dict().items()})
    return model, tensors


def test_features_are_timms(small, tmp_path):
    model, tensors = small
    torch.save({"model": under("module._orig_mod.", tensors)}, tmp_path / "file.pth")
    for size, resampled in ((112, False), (70, True)):
        encoder, report = load_frozen(tmp_path / "file.pth", image_size=size)
        model.set_input_size(img_size=size)  # resamples as timm does
        with torch.no_grad():
            expected = model(images(size))
            assert (encoder.backbone(images(size)) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert report.arch == "timm:vit_small_patch14_reg4_dinov2.lvd142m"
        assert ("positions resampled from 8x8 to 5x5" in report.notes) == resampled
        assert report.dropped == {"mask_token": 1}
        assert report.reasons == {"mask_token": "left out by timm's converter"}


def test_what_is_wrong_is_said_and_not_the_flag_that_was_given(small, tmp_path):
    _, tensors = small
    named, asked = "timm:vit_small_patch14_reg4_dinov2", "timm:vit_small_patch14_dinov2"

    def refusal(content, arch):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(UserError) as caught:
            load_frozen(tmp_path / "file.pth", arch, image_size=112)
        return str(caught.value)

    assert f"it fits {named}.lvd142m" in refusal(tensors, asked)
    text = refusal({k: v for k, v in tensors.items() if k != "blocks.3.ls1.gamma"}, named)
    assert "1 missing (blocks.3.ls1.gamma)" in text
    assert "--arch timm:NAME" not in text
    broken = {**tensors, "blocks.3.attn.qkv.weight": tensors["blocks.3.attn.qkv.weight"] * torch.nan}
    assert "blocks.3.attn.qkv.weight holds 442,368 NaN" in refusal(broken, None)
    odd = {**tensors, "patch_embed.proj.weight": torch.ones(384, 3, 16, 16)}  # which timm would resample
    assert "1 of another shape (patch_embed.proj.weight" in refusal(odd, named)
    assert "unexpected (blocks.12.ls1.gamma)" in refusal({**tensors, "blocks.12.ls1.gamma": torch.ones(384)}, named)


@pytest.mark.parametrize(("name", "wanted"), [
    ("vit_small_patch14_dinov2", {}), ("eva02_tiny_patch14_224", {}), ("beit_base_patch16_224", {}), (
        "convnext_tiny", {}), ("regnety_002", {}), ("tf_efficientnet_lite0", None), (
        "vit_base_patch16_radio_v3", {"interpolation": "bilinear", "antialias": False, "align_corners": True})])
def test_timms_converter_is_where_it_is_looked_for(name, wanted):
    """It is no part of timm's documented interface; the oracle is what timm would load with, if it were let to."""
    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.models._builder.load_pretrained", lambda *_, **options: used.append(options["filter_fn"]))
        timm.create_model(name, pretrained=True, **({"depth": 1} if "patch" in name else {}))
    found = converter(name)
    if wanted is None:
        assert found is None is used[0]
        return
    ours, theirs = ((getattr(x, "func", x), getattr(x, "keywords", {})) for x in (found, used[0]))
    assert ours == theirs and ours[1] == wanted


def test_a_timm_that_keeps_its_converters_elsewhere_is_refused(monkeypatch):
    monkeypatch.delattr("timm.models.vision_transformer.build_model_with_cfg")
    converter.cache_clear()
    with pytest.raises(UserError, match=r"^timm [\d.]+ keeps its converter for the files of vit_tiny_patch16_224"):
        converter("vit_tiny_patch16_224")
