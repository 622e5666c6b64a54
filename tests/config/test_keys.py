"""The table of metric keys is complete, without overlap, and resolves concrete names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from flowray.config.keys import KEYS, LOSS, alternatives, describe
from flowray.config.losses import LossConfig, TermConfig

CONTRACT = """
loss/{flow,kl,kl_raw,clip,dino,lpips,tv,norm,anchor,total} weight/kl lr/head
amp/{scale,backoffs} grad/{flow,kl,clip,dino,total}
grad/clip_frac grad/{flow,kl}_weighted step/{z_head,flow_head}_update_ratio
ent/{teacher,student} mu/{abs_mean,rms} logvar/mean std/{mean,min,max}
z_init/{mean,var,std_per_dim_mean} scale/{z0,z1,xt,v}_norm scale/ratio
flow/{cos,nmse,speed_ratio,cond_gain_cos} flow/{nmse,cos}_t{0..9}
flow/endpt_rmse@{8,16,32,64} shoot/{mse,nmse,skill,cond_gain}
teacher/mse@{5,10,20,50,100} teacher_native/mse@100
text/{cos,cos_mu,cos_same,snr} vae/psnr time/embed_norm gain/best ema/delta_rms eval/all_correct
perf/{images_per_s,step_s,data_wait_s,mfu,memory_gb}
"""


@pytest.mark.parametrize(
    "name", [name for pattern in CONTRACT.split() for name in alternatives(pattern)]
)
def test_every_contract_key_is_described_under_its_own_name(name: str) -> None:
    key = describe(name)
    assert key is not None
    assert key.name == name
    assert key.unit
    assert key.formula
    assert key.source
    assert key.direction in {"higher", "lower", "none"}
    assert key.good is None or key.good[0] < key.good[1]


def test_a_key_of_each_loss_has_every_loss() -> None:
    terms = {name: getattr(LossConfig(), name) for name in LossConfig.model_fields}
    names = [name for name, term in terms.items() if isinstance(term, TermConfig)]
    assert sorted(alternatives(LOSS)) == sorted(names)


def test_the_glossary_has_every_kind_of_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
    kinds = {key.name.partition("/")[0] for key in KEYS}
    listed = text.partition("| keys | what they measure |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)/`", listed)) == kinds


def test_alternatives() -> None:
    assert list(alternatives("a_{x,y}@{1..2}")) == ["a_x@1", "a_x@2", "a_y@1", "a_y@2"]
    assert list(alternatives("plain")) == ["plain"]


def test_no_concrete_key_is_declared_twice() -> None:
    counts = Counter(name for key in KEYS for name in alternatives(key.name))
    assert [name for name, count in counts.items() if count > 1] == []


def test_ema_measures_the_same_thing_on_other_weights() -> None:
    raw, ema = describe("shoot/nmse"), describe("ema/shoot/nmse")
    assert raw is not None
    assert ema is not None
    assert (ema.name, ema.unit, ema.good, ema.direction) == (
        "ema/shoot/nmse",
        raw.unit,
        raw.good,
        raw.direction,
    )
    assert "EMA" in ema.formula
    own = describe("ema/delta_rms")
    assert own is not None
    assert "minus raw" in own.formula


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("flow/cos", (0.5, 1.0)),
        ("flow/speed_ratio", (0.5, 2.0)),
        ("scale/ratio", (1 / 3, 3.0)),
        ("text/cos", (-1.0, 0.9)),
    ],
)
def test_the_logs_thresholds(name: str, good: tuple[float, float]) -> None:
    key = describe(name)
    assert key is not None
    assert key.good == good


@pytest.mark.parametrize(
    "name",
    [
        "flow/nmse_t10",
        "flow/coss",
        "loss/foo",
        "step",
        "ema/step",
        "ema/ema/flow/cos",
        "lr/",
        "lr/a/b",
        "weight/foo",
        "grad/foo_head",
        "grad/cos_flow_foo",
        "balance/total",
        "",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    assert describe(name) is None
