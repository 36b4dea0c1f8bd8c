"""ldm/weights/find.py against a Hub of our own:
an HTTP server on this machine that answers like the real one."""
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

import ldm
from ldm.weights.find import find, find_vae, wanted

COMMIT, OLDER = "a" * 40, "b" * 40
MODEL_INDEX   = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
                 "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
                 "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "PNDMScheduler"],
                 "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                 "text_encoder_2": [None, None], "requires_safety_checker": True}
SMALL = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
         "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json",
         "scheduler/scheduler_config.json"]
PLAIN = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
         "text_encoder/model.safetensors"]
FP16  = [path.replace(".safetensors", ".fp16.safetensors") for path in PLAIN]
REST  = ["README.md", "v1-5-pruned.ckpt", "safety_checker/model.safetensors", "safety_checker/config.json",
         "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.bin",
         "vae/sub/config.json", "unet/diffusion_flax_model.msgpack", "text_encoder/pytorch_model.bin",
         "feature_extractor/preprocessor_config.json"]
SHARDS = ["unet/diffusion_pytorch_model.safetensors.index.json",
          "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
          "unet/diffusion_pytorch_model-00002-of-00002.safetensors"]


def repository(*paths):
    """Path → content."""
    return {path: json.dumps(MODEL_INDEX if path == "model_index.json" else {"path": path}).encode()
            for path in paths}


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks about a repository: its commit and listing, its tree, its files."""
    repositories: ClassVar = {}             # name → {path: content}, or the X-Error-Code with which
                                            # it is refused;
                                            # "name@v1" → its state at the tag v1, which is the commit OLDER
    asked: ClassVar        = []             # the paths of all requests
    fail_at: ClassVar      = ""             # a path that gives an error

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        parts = path.removeprefix("/api/models").split("/")[1:]
        name  = "/".join(parts[:2])
        what, revision, file = *[*parts[2:4], "", ""][:2], "/".join(parts[4:])
        old   = revision in ("v1", OLDER)
        repo  = self.repositories.get(f"{name}@v1" if old else name, "RepoNotFound")
        files = repository(*SMALL, *PLAIN) if repo == "GatedRepo" else repo     # whose listing is public
        if self.fail_at and path.endswith(self.fail_at):
            self.answer(400)
        elif isinstance(repo, str) and (what == "resolve" or repo != "GatedRepo"):
            self.answer(403 if repo == "GatedRepo" else 404, X_Error_Code=repo)
        elif revision not in ("", "main", COMMIT, "v1", OLDER):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif what == "resolve":
            self.answer(200, files[file], ETag=f'"{file.replace("/", "-")}"',
                        X_Repo_Commit=OLDER if old else COMMIT)
        elif what == "tree":
            self.answer(200, json.dumps([{"type": "file", "path": path, "size": len(content), "oid": "c" * 40}
                                         for path, content in files.items()]).encode())
        else:
            self.answer(200, json.dumps({"id": name, "sha": OLDER if old else COMMIT,
                                         "siblings": [{"rfilename": path} for path in files]}).encode())
    do_HEAD = do_GET

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """huggingface_hub, online, with our Hub for the real one, an empty cache and no token."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ENDPOINT": server, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
                        "HUGGINGFACE_CO_URL_TEMPLATE": server + "/{repo_id}/resolve/{revision}/{filename}",
                        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.chdir(tmp_path)
    for name, value in {"repositories": {}, "asked": [], "fail_at": ""}.items():
        monkeypatch.setattr(Hub, name, value)
    return Hub


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write(folder, *paths):
    for path, content in repository(*paths).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def cached(tmp_path, *paths):
    """A cache as another program may have left it."""
    repo = tmp_path / "cache" / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(OLDER)
    return write(repo / "snapshots" / OLDER, *paths)


# -- local folders -------------------------------------------------------------------------------------------
def test_a_local_folder_is_returned_as_it_is(tmp_path, monkeypatch, no_network):
    folder = write(tmp_path / "org" / "model", *SMALL, *PLAIN)
    monkeypatch.chdir(tmp_path)
    assert find(folder) == folder
    assert find(str(folder)) == folder
    assert find("org/model").samefile(folder)          # a folder here comes before a repository
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/org/model") == folder


def test_local_folders_that_are_no_pipelines(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model", "unet/config.json")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing\. In the folder: unet"):
        find(tmp_path / "model")
    write(tmp_path / "model", "transformer/config.json")
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    for read in (find, ldm.inspect):
        with pytest.raises(ValueError, match=r"is a StableDiffusion3Pipeline without a U-Net; ldm reads"):
            read(tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a file, where a folder"):
        find("model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"single file, give its path, such as .*/model\.safetensors"):
        find(tmp_path)
    with pytest.raises(FileNotFoundError, match="is an address: give the name of the repository"):
        find("https://hub.example/org/model")
    for name in (tmp_path / "org" / "model", "./org/model", "/no/such/folder",
                 "a/b/c", "~/models/sd", "org/mo del", "lost.safetensors", "org/lost.ckpt"):
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            find(name)


def test_a_path_object_is_never_a_repository(tmp_path, monkeypatch, hub):
    with pytest.raises(FileNotFoundError, match=r"There is no folder.*on the Hub, whose names are strings"):
        find(Path("org/model"))
    assert hub.asked == []


def test_variant_and_revision_of_a_local_folder(tmp_path, no_network):
    folder = write(tmp_path, *SMALL, *PLAIN, FP16[0],
                   "vae/diffusion_pytorch_model.non_ema-00001-of-00002.bin")
    assert find(folder, variant="fp16") == folder
    assert find(folder, variant="non_ema") == folder
    with pytest.raises(ValueError, match=r"variant 'bf16', only plain ones and unet: fp16; vae: non_ema$"):
        find(folder, variant="bf16")
    with pytest.raises(ValueError, match=r"is for repositories on the Hub; .* is a folder"):
        find(folder, revision="main")


# -- which files are downloaded ------------------------------------------------------------------------------
def test_wanted_takes_what_we_read_and_no_more():
    everything = [*REST, *SMALL, *PLAIN, *FP16]
    assert set(wanted("x", everything, None)) == {*SMALL, *PLAIN}
    assert set(wanted("x", everything, "fp16")) == {*SMALL, *FP16}
    assert set(wanted("x", everything, "non_ema")) == \
        {*SMALL, *PLAIN[1:], "unet/diffusion_pytorch_model.non_ema.bin"}        # per component
    assert set(wanted("x", [*REST, *SMALL, *PLAIN[1:]], None)) == \
        {*SMALL, *PLAIN[1:], "unet/diffusion_pytorch_model.bin"}


def test_wanted_takes_an_index_with_its_shards():
    fp16 = ["unet/diffusion_pytorch_model.safetensors.index.fp16.json",
            "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"]
    assert set(wanted("x", [*SMALL, *PLAIN[1:], *fp16, *SHARDS], None)) == {*SMALL, *PLAIN[1:], *SHARDS}
    assert set(wanted("x", [*SMALL, *PLAIN[1:], *fp16, *SHARDS], "fp16")) == {*SMALL, *PLAIN[1:], *fp16}


def test_wanted_refuses_what_is_no_pipeline():
    with pytest.raises(FileNotFoundError,
                       match=r"org/lora is not .*: no model_index\.json, but README\.md, lora\.saf"):
        wanted("org/lora", ["lora.safetensors", "README.md"], None)
    with pytest.raises(FileNotFoundError,
                       match=r"org/dit is not a pipeline of U-Net.*: no unet/config\.json, but"):
        wanted("org/dit", ["model_index.json", "vae/config.json", "transformer/config.json"], None)
    with pytest.raises(FileNotFoundError,
                       match=r"no plain safetensors or \.bin weights in unet/\. There: config\.json"):
        wanted("x", [*SMALL, *PLAIN[1:], "unet/diffusion_flax_model.msgpack"], None)
    with pytest.raises(FileNotFoundError, match=r"in unet/\. There are those of fp16: give variant='fp16'\."):
        wanted("x", [*SMALL, *FP16], None)
    with pytest.raises(ValueError,
                       match=r"No component of x has weights of variant 'fp16', only plain ones: leave"):
        wanted("x", [*SMALL, *PLAIN], "fp16")
    with pytest.raises(ValueError, match=r"'bf16', only unet: fp16; vae: fp16; text_encoder: fp16$"):
        wanted("x", [*SMALL, *FP16], "bf16")


# -- the Hub -------------------------------------------------------------------------------------------------
def test_a_download_and_then_the_cache_alone(hub):
    hub.repositories["org/model"] = repository(*REST, *SMALL, *PLAIN, *FP16)
    folder = find("org/model")
    assert files_in(folder) == {*SMALL, *PLAIN}
    assert (folder / PLAIN[0]).read_bytes() == hub.repositories["org/model"][PLAIN[0]]
    assert folder.name == COMMIT
    del hub.repositories["org/model"]                               # deleted on the Hub
    hub.asked.clear()
    assert find("org/model") == folder
    assert find("org/model", revision="main") == folder
    assert find("org/model", revision=COMMIT) == folder
    assert hub.asked == []                                          # not even a question


def test_variants_are_added_to_the_cache(hub):
    hub.repositories["org/model"] = repository(*SMALL, *PLAIN, *FP16)
    find("org/model")
    assert files_in(find("org/model", variant="fp16")) == {*SMALL, *PLAIN, *FP16}
    hub.asked.clear()
    find("org/model", variant="fp16")
    assert hub.asked == []
    with pytest.raises(ValueError,
                       match="'bf16', only plain ones and unet: fp16; vae: fp16; text_encoder: fp16"):
        find("org/model", variant="bf16")


def test_a_variant_that_only_some_components_have(hub, monkeypatch):
    """The Hub is asked each time, for it might have the rest by now; without it, the cache is good enough."""
    hub.repositories["org/model"] = repository(*SMALL, *PLAIN, FP16[0])
    folder = find("org/model", variant="fp16")
    assert files_in(folder) == {*SMALL, FP16[0], *PLAIN[1:]}
    hub.asked.clear()
    assert find("org/model", variant="fp16") == folder
    assert hub.asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find("org/model", variant="fp16") == folder


def test_revisions(hub):
    hub.repositories.update({"org/model": repository(*SMALL, *PLAIN),
                             "org/model@v1": repository(*SMALL, *FP16)})
    new, old = find("org/model"), find("org/model", revision="v1", variant="fp16")
    assert (new.name, old.name) == (COMMIT, OLDER)
    assert files_in(new) == {*SMALL, *PLAIN}
    assert files_in(old) == {*SMALL, *FP16}
    assert find("org/model") == find("org/model", revision=COMMIT) == new
    assert find("org/model", revision=OLDER, variant="fp16") == old
    with pytest.raises(FileNotFoundError, match=r"org/model has no branch, tag or commit 'v2'$"):
        find("org/model", revision="v2")


def test_repositories_that_are_refused(hub):
    with pytest.raises(FileNotFoundError,
                       match=r"no repository http.*/org/typo \(it may .* no folder .*org/typo$"):
        find("org/typo")
    hub.repositories["org/gated"] = "GatedRepo"                     # its listing is public, its files are not
    with pytest.raises(PermissionError,
                       match=r"org/gated is gated: accept its terms on http.*/org/gated, then `hf"):
        find("org/gated")
    hub.repositories["org/lora"] = repository("lora.safetensors")
    with pytest.raises(FileNotFoundError, match="org/lora is not a pipeline"):
        find("org/lora")


def test_an_interrupted_download_goes_on(hub, monkeypatch):
    hub.repositories["org/model"] = repository(*SMALL, *PLAIN)
    monkeypatch.setattr(hub, "fail_at", PLAIN[0])
    with pytest.raises(ConnectionError,
                       match=r"org/model is not complete in the cache .*/cache and could not be d"):
        find("org/model")
    monkeypatch.setattr(hub, "fail_at", "")
    assert files_in(find("org/model")) == {*SMALL, *PLAIN}


def test_a_hub_that_goes_away_in_the_middle(hub, tmp_path, monkeypatch):
    """snapshot_download is content with a partial snapshot then; we are not."""
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        pytest.skip("this version of huggingface_hub does not ask for the tree")
    hub.repositories["org/model@v1"] = repository(*SMALL, *PLAIN)
    cached(tmp_path, *SMALL)
    monkeypatch.setattr(hub, "fail_at", f"/tree/{OLDER}")
    with pytest.raises(ConnectionError,
                       match=r"org/model was cut off: .* lacks unet/diffusion.*\. Try again"):
        find("org/model", revision=OLDER)


@pytest.mark.parametrize("lost", [PLAIN[0], "tokenizer/special_tokens_map.json"])
def test_a_snapshot_with_a_hole_is_completed(hub, lost):
    """Also a lost special_tokens_map.json, without which the padding would silently be another."""
    if lost in SMALL and not hasattr(huggingface_hub, "get_cached_repo_tree"):
        pytest.skip("this version of huggingface_hub keeps no listing")
    hub.repositories["org/model"] = repository(*SMALL, *PLAIN)
    folder = find("org/model")
    (folder / lost).unlink()
    assert files_in(find("org/model")) == {*SMALL, *PLAIN}


@pytest.mark.parametrize("lost", ["unet/config.json", "scheduler/scheduler_config.json",
                                  "tokenizer/merges.txt"])
def test_a_cache_of_another_program_that_lacks_a_small_file_is_completed(hub, tmp_path, lost):
    hub.repositories["org/model"] = repository(*SMALL, *PLAIN)
    folder = cached(tmp_path, *SMALL, *PLAIN)
    (folder / lost).unlink()
    assert (find("org/model") / lost).is_file()


def test_a_snapshot_without_one_of_its_shards_is_completed(hub):
    files = repository(*SMALL, *PLAIN[1:], *SHARDS)
    files[SHARDS[0]] = json.dumps({"weight_map": {"a": SHARDS[1][5:], "b": SHARDS[2][5:]}}).encode()
    hub.repositories["org/model"] = files
    folder = find("org/model")
    (folder / SHARDS[2]).unlink()
    assert files_in(find("org/model")) == {*SMALL, *PLAIN[1:], *SHARDS}
    hub.asked.clear()
    find("org/model")
    assert hub.asked == []


# -- offline -------------------------------------------------------------------------------------------------
def test_offline_with_a_cache(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = cached(tmp_path, *SMALL, *FP16)
    assert find("org/model", variant="fp16") == folder
    assert find("org/model", variant="fp16", revision=OLDER) == folder
    with pytest.raises(ConnectionError,
                       match=r"org/model is not complete in the cache .*OfflineModeIsEnabled"):
        find("org/model")                                          # only float16 is there
    with pytest.raises(ConnectionError,
                       match=r"HF_HUB_OFFLINE.*Check the connection and .*, or give a local folder"):
        find("org/other")
    with pytest.raises(ConnectionError):
        find("org/model", variant="fp16", revision="v1")
    assert hub.asked == []


def test_a_hub_out_of_reach(hub, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT",
                            f"http://127.0.0.1:{closed.getsockname()[1]}")
    folder = cached(tmp_path, *SMALL, *PLAIN)
    assert find("org/model") == folder
    with pytest.raises(ConnectionError, match="org/model is not complete in the cache"):
        find("org/model", variant="fp16")                          # nothing of it is in float16
    with pytest.raises(ConnectionError, match=r"org/other is not complete in the cache .*\(Connect"):
        find("org/other")


# -- autoencoders alone --------------------------------------------------------------------------------------
VAE = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "README.md"]


def test_a_repository_of_an_autoencoder(hub):
    hub.repositories["org/vae"] = repository(*VAE)
    folder = find_vae("org/vae")
    assert files_in(folder) == set(VAE[:2])
    hub.asked.clear()
    assert find_vae("org/vae") == folder
    assert hub.asked == []


def test_an_autoencoder_without_the_variant_is_read_plain_offline_too(hub, monkeypatch):
    hub.repositories["org/vae"] = repository(*VAE)
    folder = find_vae("org/vae", variant="fp16")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_vae("org/vae", variant="fp16") == folder
    with pytest.raises(ConnectionError, match="OfflineModeIsEnabled"):
        find_vae("org/other", variant="fp16")


def test_the_autoencoder_of_a_whole_model(hub):
    hub.repositories["org/model"] = repository(*SMALL, *PLAIN, *FP16)
    folder = find_vae("org/model")
    assert folder.name == "vae"
    assert files_in(folder.parent) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert find_vae("org/model", variant="fp16") == folder
    assert "diffusion_pytorch_model.fp16.safetensors" in files_in(folder)


def test_repositories_without_an_autoencoder(hub, tmp_path):
    hub.repositories["org/lora"] = repository("lora.safetensors", "unet/config.json")
    with pytest.raises(FileNotFoundError, match=r"org/lora has no autoencoder .*There: lora\.safetensors"):
        find_vae("org/lora")
    hub.repositories["org/vae"] = repository(VAE[0], VAE[1].replace(".safetensors", ".fp16.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"There are those of fp16: give variant='fp16'\."):
        find_vae("org/vae")
    hub.repositories["org/vae"] = repository(VAE[1].replace(".safetensors", ".fp16.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"at the top or in vae/\)\. There: diffusion_pytorch_model"):
        find_vae("org/vae")
    with pytest.raises(FileNotFoundError, match="There is no repository"):
        find_vae("org/none")
    hub.asked.clear()
    for name in ("lost.safetensors", tmp_path / "org" / "vae"):
        with pytest.raises(FileNotFoundError, match="There is no folder or file"):
            find_vae(name)
    assert hub.asked == []


def test_the_autoencoder_of_a_folder(tmp_path, no_network):
    whole, alone = write(tmp_path / "model", *SMALL, *PLAIN), write(tmp_path / "vae", *VAE)
    assert find_vae(whole) == whole / "vae"
    assert find_vae(alone) == alone
    with pytest.raises(ValueError, match="revision='v1' is for repositories"):
        find_vae(alone, revision="v1")
