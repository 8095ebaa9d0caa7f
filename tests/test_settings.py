"""A run that an earlier version made goes on: settings that came later say what it did."""

import pytest
from test_structure import parse

import methods
from losses import build_loss
from runtime.state import NEUTRAL, VOLATILE

FIRST = {  # the settings of the first runs
    "train_distill": """amp aug batch_size beta branch cache checkpoint_key closek_info cluster_info cos coverage data
        data_path device distill distributed epochs fark_info image_cache image_size knn_data knn_every l_0
        l_1 local_rank loss lr mean momentum nearest_k on_bad_image output print_freq resume s_temp sampler
        schedule seed start_epoch std stem student_arch subset t_temp teacher_arch teacher_stem total_k
        trust_checkpoint warmup_epochs weight_decay workers""",
    "train_teacher": """amp arch aug batch_size bn_parts cache cos data data_path device distributed epochs head_bn
        image_cache image_size knn_data knn_every local_rank lr moco_dim moco_k moco_m moco_t momentum
        on_bad_image output print_freq resume schedule seed start_epoch stem subset warmup_epochs
        weight_decay workers"""}
ELSEWHERE = {"train_distill": VOLATILE | methods.LOSS_FLAGS, "train_teacher": VOLATILE}


@pytest.mark.parametrize("script", FIRST)
def test_a_new_setting_says_what_runs_did_that_did_not_have_it(script):
    """In runtime.state: in NEUTRAL, or in VOLATILE where it makes no other run."""
    args, first = vars(parse((script,))), set(FIRST[script].split())
    assert first <= set(args)
    new = args.keys() - first - ELSEWHERE[script]
    assert {name: args[name] for name in new} == {name: NEUTRAL.get(name, "is missing") for name in new}


def test_what_the_first_runs_loss_was():
    first = {"l_0": 1.0, "l_1": 0.5, "s_temp": 0.1, "t_temp": 0.07, "lr": 0.1}
    assert methods.complete(first) == {**first, "losses": {"coss": build_loss("coss", l_1=0.5).settings}}
    assert methods.complete({"lr": 0.1}) == {"lr": 0.1}
    now = {**first, "losses": {}}
    assert methods.complete(now) == now


def test_the_loss_flags_are_those_that_losses_are_made_of():
    assert set(methods.options(parse(("train_distill",)))) == methods.LOSS_FLAGS
