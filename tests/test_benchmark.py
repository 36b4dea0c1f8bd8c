"""What scripts/benchmark.py makes of its numbers; the measuring itself is nothing for a test."""
import itertools
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
import benchmark
from benchmark import Clock


def test_exponents_are_those_of_a_power_law_and_know_a_bend():
    points = [{"at": x, "seconds": 3 * x**1.5 if x < 16 else None, "bytes": x if x < 4 else x**2 / 4}
              for x in (1, 2, 4, 8, 16)]
    found  = benchmark.exponents(points, "seconds")
    assert found["between"] == pytest.approx([1.5] * 3)
    assert found["overall"] == pytest.approx(1.5)
    assert benchmark.exponents(points, "bytes")["between"] == pytest.approx([1, 1, 2, 2])


def test_all_take_turns_and_each_goes_first():
    order, clock = [], Clock("cpu")
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = benchmark.turns(clock, calls, 6)
    assert {name: len(each) for name, each in seconds.items()} == dict.fromkeys("abc", 6)
    rounds = ["".join(order[i:i + 3]) for i in range(3, 21, 3)]                       # after one to warm up
    assert rounds == ["cba", "abc", "acb", "bca", "bac", "cab"]
    after_itself = [a for a, b in itertools.pairwise(order[3:]) if a == b]
    assert sorted(after_itself) == ["a", "b", "c"]
    order.clear()
    benchmark.turns(clock, calls, 1, {"a": calls["a"]})
    assert "".join(order) == "a" "cba"


def test_the_table_has_every_number():
    row = benchmark.row("load", {"diffusers": [2.0, 4.0], "ldm": [1.0, 1.0]},
                        memory={"diffusers": 9, "ldm": 8})
    row  |= {"flops": 1e12, "in": "bfloat16"}                # a floor of half a second
    other = benchmark.row("decode", {"ldm": [4.0]}) | {"flops": 1e12}       # of one: convolutions are faster
    row["contestants"]["ldm"] |= {"of_weights": 1.03, "ratio_to_float32": 2.5}
    scaling = {"what": "steps", "points": [{"at": 1, "seconds": 0.5, "bytes": 7e6},
                                           {"at": 2, "seconds": None, "bytes": 28e6}],
               "seconds_exponents": {"between": [], "overall": 1.25},
               "bytes_exponents": {"between": [2], "overall": 2}}
    text = benchmark.tables("cpu", {
        "machine": dict.fromkeys(("device", "threads", "torch", "diffusers", "date", "clock"), "x"),
        "dtype": "float32", "rates": {"product": 5e11, "convolution": 1e12, "bfloat16": 2e12, "bytes": 1e9},
        "spent": {"start": 7.0, "cold": 60.0},
        "rows": [row, other], "scaling": [scaling],
        "memory": [{"what": "step", "bytes": {"ldm": 1e9}}, {"what": "decode", "bytes": {"tiled": 2e9}}]})
    for words in ("0.5 TFLOP/s in a matrix product, 1 in a convolution, 2 in bfloat16 at best, 1 GB/s in a",
                  "The run took 67 s", "| decode | ldm | 4 (4 … 4) |  |  | 25 % |",
                  "images/scaling-cpu.svg",
                  "| load | ldm | 1 (1 … 1) |  |  | 50 % | × 3.00, × 2.50 diffusers' float32 | 0.00 GB",
                  ", × 1.03 the weights |",
                  "| step | 1 GB |  |", "| decode |  | 2 GB |", "| steps | 1 | 0.5 |  | 7 MB |  |",
                  "| steps | 2 |  |  | 28 MB | 2.00 |", "| steps | all | | 1.25 | | 2.00 |"):
        assert words in text


def test_the_date_of_a_table_spans_the_days_of_its_parts():
    assert benchmark.days("2026-11-21", "2026-11-21") == "2026-11-21"
    assert benchmark.days("2026-11-21", "2026-11-22") == "2026-11-21 to 2026-11-22"
    assert benchmark.days("2026-11-21 to 2026-11-22", "2026-11-30") == "2026-11-21 to 2026-11-30"


def test_a_page_keeps_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    page = "before\n<!-- table cuda -->\nold\n<!-- end -->\nafter\n"
    unmeasured = "*Not measured yet; the command above fills this table.*"
    assert benchmark.page(page) == page.replace("old", unmeasured)


def test_the_tables_of_the_page_are_those_of_the_json():
    text = benchmark.PAGE.read_text("utf-8")
    assert benchmark.page(text) == text, "run: python scripts/benchmark.py --tables"


def test_what_is_quick_can_be_measured_and_the_original_where_it_is():
    result = {"rates": {"product": 1e12}, "dtype": "float32", "counted": {
        name: {"flops": 1.0} for name in ("SD 1.5, one call with guidance", "decode, 512 × 512")}}
    here = {"device": "cpu", "quick": True}
    known, more = ({*benchmark.parts(Namespace(**here, original=folder), Clock("cpu"), result)}
                   for folder in (None, Path()))
    assert {*benchmark.QUICK} < known
    assert more - known == {"original"}


@torch.no_grad()
def test_memory_of_a_step_and_a_decode_on_a_cpu():
    found = {one["what"]: one["bytes"] for one in benchmark.memory("cpu", torch.float32, (64, 128))}
    step, decode = (found[f"{what}, 128², float32"] for what in ("SD 1.5, one guided step", "decode"))
    assert step["fast.in_place"] < step["ldm"] < step["diffusers"]
    assert decode["ldm"] == pytest.approx(3 * 256 * 128**2 * 4, rel=0.01)       # three maps of 256 channels
    assert found["decode, 64², float32"]["ldm"] == pytest.approx(decode["ldm"] / 4, rel=0.01)


@pytest.mark.parametrize("family", benchmark.SIZES)
def test_the_contestants_of_a_gpu_are_whole(family):
    """Put together on the meta device, where nothing is computed; diffusers' too."""
    unet, their_unet = benchmark.unets(family, "meta", torch.float16)
    vae, their_vae   = benchmark.vaes("meta", torch.float16, family)
    pipe   = benchmark.stand_in(family, unet, vae)
    theirs = benchmark.their_pipeline(family, their_unet, their_vae)
    assert pipe.defaults.height == theirs.unet.config.sample_size * theirs.vae_scale_factor
    assert vae.config.scaling_factor == theirs.vae.config.scaling_factor
    assert not theirs.vae.config.force_upcast
