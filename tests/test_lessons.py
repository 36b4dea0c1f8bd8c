"""The lessons run as they stand, and what they say comes true."""
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

LESSONS = Path(__file__).resolve().parents[1] / "docs" / "lessons"


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    def run(number: int) -> dict[str, Any]:
        path, = LESSONS.glob(f"{number}_*.py")
        return runpy.run_path(str(path), run_name="__main__")
    return run


def test_no_lesson_is_forgotten():
    assert sorted(path.name[0] for path in LESSONS.glob("*.py")) == ["1", "2", "3", "4"]


def test_1_the_order_of_a_sampler(lesson):
    errors = lesson(1)["errors"]
    euler, heun = (errors[8][i] / errors[64][i] for i in (0, 1))
    assert 5 < euler < 12
    assert heun > 20
    assert errors[64][1] < errors[64][0]


def test_2_guidance_helps(lesson):
    right = lesson(2)["right"]
    assert right[3] > right[1]


def test_3_attention(lesson):
    names = lesson(3)
    assert len(names["shares"]) > 0
    assert Image.open("attention.png").width > 4 * names["picture"].width


def test_4_steering(lesson):
    names = lesson(4)
    plain, symmetric, _ = names["ends"]
    torch.testing.assert_close(symmetric, symmetric.flip(-1))
    assert (plain - plain.flip(-1)).abs().max() > .1
    plain, _, brighter = names["pictures"]
    assert brighter.mean() > plain.mean() + .1
