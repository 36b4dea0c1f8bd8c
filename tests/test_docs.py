"""Every block of Python in the documentation runs, page by page, and does what the page says."""
import ast
import dataclasses
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

import ldm

DOCS  = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts
               and "```python" in path.read_text("utf-8"))


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """Runs the blocks of a page in one namespace, which it returns; once for all tests of that page."""
    @lru_cache
    def run(page: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "docs"}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("docs"))
            if page == "files.md":
                names |= {"ldm": ldm, "dataclasses": dataclasses}
                write_what_files_names()
            for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL):
                exec(compile(code, page, "exec"), names)
        return names
    return run


def write_what_files_names() -> None:
    """Small models under the names of files.md, in the current folder."""
    parts = checkpoints.parts_of("SD 1.5")
    state = checkpoints.checkpoint("SD 1.5", parts)
    for folder in ("organisation/model", "models/stable-diffusion-v1-5"):
        checkpoints.write_folder(Path(folder), "SD 1.5", parts)
    parts["vae"].save_pretrained("organisation/vae")
    for file in ("v1-5-pruned-emaonly.safetensors", "model.safetensors"):
        checkpoints.write_file(Path(file), state)
    prefix = "first_stage_model."
    checkpoints.write_file(Path("vae-ft-mse-840000-ema-pruned.safetensors"),
                           {name.removeprefix(prefix): tensor for name, tensor in state.items()
                            if name.startswith(prefix)})


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(run_page, page):
    run_page(page)


def test_one_page_makes_the_picture_of_sample(run_page):
    names = run_page("book/one_page.md")
    theirs = np.asarray(ldm.images.to_pil(ldm.images.to_unit(names["picture"]))[0]).astype(float)
    assert np.abs(np.asarray(names["same"]).astype(float) - theirs).mean() < 1    # of 255; starts at σ₀·noise
    assert theirs.std() > 20


def red(image) -> float:
    return float(np.asarray(image).astype(float)[..., 0].mean())


def test_swapped_parts_are_heard(run_page):
    names = run_page("book/swap.md")
    reference = np.asarray(names["run"](names["denoise"])).astype(float)
    for name in ("image", "faded", "preview", "right"):
        assert np.asarray(names[name]).shape == reference.shape
        assert np.abs(np.asarray(names[name]).astype(float) - reference).mean() > .1
    for name, scale in (("led_away", 1), ("sharp", None)):
        plain, = ldm.sample(names["prompt"], names["pipe"], guidance_scale=scale, steps=12)
        assert np.abs(np.asarray(names[name]).astype(float) - np.asarray(plain)).mean() > .1
    assert np.array_equal(np.asarray(names["left"]), reference)


def test_the_ideal_denoiser_remembers(run_page):
    names = run_page("book/swap.md")
    distances = (names["latents"] - names["pictures"]).square().mean(dim=(1, 2, 3)).sqrt()
    assert distances.min() < .01 < distances.sort().values[1]


def test_the_hook_makes_symmetric_pictures(run_page):
    names = run_page("book/swap.md")
    last = names["seen"][-1]
    assert len(names["seen"]) == len(names["sigmas"]) - 1
    torch.testing.assert_close(last, last.flip(-1))


def test_the_scheduler_with_a_hook_makes_symmetric_pictures(run_page):
    star = np.asarray(run_page("book/swap.md")["star"]).astype(float)
    assert np.abs(star - star[:, ::-1]).mean() < 2 < star.std()    # of 255; latents are mirrored, not pixels


def test_a_picture_finds_its_noise_and_comes_back(run_page):
    names = run_page("book/swap.md")
    assert names["found"].std() / names["up"][-1] == pytest.approx(1, abs=.1)
    assert (names["back"] - names["made"]).square().mean().sqrt() < .01


def test_a_schedule_has_the_levels_it_was_made_of(run_page):
    names = run_page("book/swap.md")
    np.testing.assert_allclose(names["own"].table, names["table"], rtol=1e-9)


def test_gradients_reach_the_start_and_the_text(run_page):
    names = run_page("book/swap.md")
    for wanted in ("x", "text"):
        gradient = names[wanted].grad
        assert gradient.shape == names[wanted].shape
        assert gradient.abs().max() > 0


def test_attention_maps_are_shares(run_page):
    names = run_page("book/swap.md")
    assert len(names["maps"]) == sum(name.endswith("attn2") for name, _ in names["pipe"].unet.named_modules())
    for shares in names["maps"]:
        assert shares.shape[-1] == names["cond"].context.shape[1]
        torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))


def test_the_annotated_pages_hold_all_the_code(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import annotated
    for name in annotated.FILES:
        source = (annotated.ROOT / "ldm" / f"{name}.py").read_text("utf-8")
        pieces = annotated.pieces(source)
        tree   = ast.parse("\n".join(code for _, code in pieces))
        wanted = ast.parse(source)
        for node in ast.walk(wanted):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                assert ast.get_docstring(node) in {text for text, _ in pieces}
                del node.body[0]
        assert ast.dump(tree) == ast.dump(wanted), name


def test_every_paper_cited_is_in_the_list():
    """… beside the file whose docstrings cite it."""
    entries = (DOCS / "papers.md").read_text("utf-8").split("\n- **")[1:]
    papers  = {entry.partition("**")[0]: entry for entry in entries}
    name    = re.compile(r"[A-Z][\w-]+(?: et al\.| & [A-Z][\w-]+)? (?:19|20)\d\d[ab]?\b")
    package = DOCS.parent / "ldm"
    cited   = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paper in name.findall(" ".join((ast.get_docstring(node) or "").split())):
                    assert f"`{path.relative_to(package).as_posix()}`" in papers.get(paper, ""), (paper, path)
                    cited.add(paper)
    assert len(cited) >= 30
