"""The commands of docs/CHECKPOINTS.md for each family of teachers, as they stand there, on files in those layouts.

Two blocks of 64 channels stand for every size: timm makes such networks here, and they count as the released width.
"""

import shlex

import pytest
import torch
from helpers import authors
from helpers.authors import FILES
from helpers.interpreter import ROOT
from helpers.scripts import in_this_process, well
from helpers.sources import (
    _no_initialisation,  # noqa: F401
    randomise,
    smallest,  # noqa: F401
    under,
)

import checkpoints.trunk
from checkpoints.timm_names import FAMILIES, PATCHES, timm_candidates

timm = pytest.importorskip("timm", reason="these networks are timm's; pip install timm")
COMMANDS = [line.rpartition("| `python ")[2].removesuffix("` |") for line in
            (ROOT / "docs" / "CHECKPOINTS.md").read_text().splitlines() if "| `python inspect_checkpoint.py" in line]
MODEL, MODULE = (lambda x: {"model": x}), (lambda x: {"module": x})  # the latter DeepSpeed's
GIVEN = {  # file -> the family of helpers.authors that lies in it, and what lies around that
    "dinov2_vits14_pretrain.pth": ("DINOv2", dict),
    "dinov3_vits16_pretrain_lvd1689m-08c60483.pth": ("DINOv3", dict),
    "dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb.pth": ("DINOv3, ConvNeXt", dict),
    "ViT-B-32.pth": ("OpenAI's CLIP", dict), "ViT-B-16-SigLIP.bin": ("SigLIP", dict),
    "ViT-B-32-laion2b.bin": ("OpenAI's CLIP", lambda x: {k: v for k, v in x.items() if k not in authors.OPENAI}),
    "EVA02_CLIP_B_psz16_s8B.pt": ("EVA-CLIP", dict), "IN1K-vit.h.14-300e.pth.tar": ("I-JEPA", dict),
    "eva02_Ti_pt_in21k_p14.pt": ("EVA-02", MODULE), "beit_base_patch16_224_pt22k_ft22k.pth": ("BEiT", MODEL),
    "aimv2-large-patch14-224.safetensors": ("AIMv2", dict), "C-RADIOv3-B.safetensors": ("RADIO", dict)}
PLAIN = {  # those of torchvision's transformers
    "dino_deitsmall16_pretrain.pth": dict, "mae_pretrain_vit_base.pth": MODEL,
    "vits16_800ep.pth.tar": lambda x: {"encoder": under("module.", x), "target_encoder": under("module.", x)}}


def file_for(name, folder):
    """Write it; returns the architecture that is found in it."""
    if name == "vit-base-patch16-224":
        transformers = pytest.importorskip("transformers", reason="writes the file; pip install transformers")
        config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
        randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**config))).save_pretrained(
            folder / name)
        return "vit_smallest_16"
    if name in PLAIN:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=64, depth=2, num_heads=2)
        torch.save(PLAIN[name](randomise(model).state_dict()), folder / name)
        return "vit_smallest_16"
    family, around = GIVEN[name]
    row = FILES[family]
    model = randomise(timm.create_model(row.network, num_classes=0, **row.options))
    content = around(row.names(model.state_dict()))
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors.torch", reason="writes the file; pip install safetensors").save_file(
            {k: v.contiguous() for k, v in content.items()}, folder / name)
    else:
        torch.save(content, folder / name)
    return f"timm:{row.network}"


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path, monkeypatch, smallest):  # noqa: F811
    script, name, *flags = shlex.split(command)
    found = file_for(name, tmp_path)
    arch = flags[flags.index("--arch") + 1] if "--arch" in flags else found
    if name in GIVEN:
        row, create = FILES[GIVEN[name][0]], timm.create_model
        released = next(width for _, names in FAMILIES for width, several in names.items() if row.network in several)
        monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, **{**row.options, **more}))
        monkeypatch.setattr(checkpoints.trunk, "timm_candidates", lambda shapes: timm_candidates({
            k: torch.Size([released, *v[1:]]) if k in PATCHES else v for k, v in shapes.items()}))
    monkeypatch.chdir(tmp_path)
    done = well(in_this_process(script, name, *flags))
    assert f"architecture    {arch}, stem" in done.out
    assert "0 missing, 0 unexpected" in done.out


def test_every_family_has_a_command():
    assert {shlex.split(command)[1] for command in COMMANDS} == {*GIVEN, *PLAIN, "vit-base-patch16-224"}
