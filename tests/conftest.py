"""Settings that every test shares."""
import os
import socket

import pytest

# Before the libraries are imported: no test may need the internet, and the models are so small that a second
# thread costs more than it gives.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none; torch is loaded only if there is such a test."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch
    torch.backends.cudnn.allow_tf32 = False         # or float32 convolutions have ten bits on a GPU
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model in Hugging Face layout."""
    import tiny
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder):
    """The tiny model, loaded; modules about other models have a `pipe` of their own."""
    import ldm
    return ldm.load(folder, device="cpu")


@pytest.fixture
def no_network(monkeypatch):
    """Any use of the network is an error, though huggingface_hub believes that it is online."""
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
