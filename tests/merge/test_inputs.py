"""References to models become folders: local ones, GGUF files, hub names, adapters."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from evomerge.errors import ConfigError
from evomerge.merge import inputs as inputs_module
from evomerge.merge.inputs import HUB_SECONDS, InputModels
from tests import tiny

QUERY = "model.layers.0.self_attn.q_proj"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

RESOLVE = """
import sys
import time
from pathlib import Path
from evomerge.errors import ConfigError
from evomerge.merge.inputs import InputModels
start = time.monotonic()
say = lambda line: print(line, file=sys.stderr)
inputs = InputModels(Path(sys.argv[1]), say=say, hub_seconds=2)
for reference in sys.argv[2:]:
    try:
        print(inputs.resolve(reference))
    except ConfigError as error:
        print(f"ConfigError {error}")
print(time.monotonic() - start)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "base", layers=1)


def test_a_local_folder_is_itself_from_the_studys_folder_on(model: Path, tmp_path: Path) -> None:
    inputs = InputModels(tmp_path, folder=model.parent)
    assert inputs.resolve("base") == model
    assert inputs.resolve(f"../{model.parent.name}/base") == model
    assert inputs.resolve(str(model)) == model
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_has_a_plus_is_a_folder(model: Path, tmp_path: Path) -> None:
    plus = tmp_path / "a+b"
    plus.symlink_to(model)
    assert InputModels(tmp_path).resolve(str(plus)) == model


def test_a_model_without_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(model / name)
    with pytest.raises(ConfigError, match=r"bare: this model has no tokenizer \(one of token"):
        InputModels(tmp_path).resolve(str(bare))
    (bare / "spiece.model").write_bytes(b"sentencepiece's older name of its vocabulary")
    assert InputModels(tmp_path).resolve(str(bare)) == bare


def test_an_adapted_model_is_made_again_when_the_chat_template_changes(
    model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model, base)
    lora = write_adapter(tmp_path / "lora", seed=1)
    inputs = InputModels(tmp_path / "storage")
    first = inputs.resolve(f"{base}+{lora}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    second = inputs.resolve(f"{base}+{lora}")
    assert second != first
    assert (second / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere", r"nowhere: this model is neither a folder \(.*/nowhere does not exist\) nor"),
        ("./owner/name", "neither a folder"),
        ("owner/name/more", "neither a folder"),
        ("a+b+c", "one [+] and a name either side"),
        ("+b", "one [+] and a name either side"),
    ],
)
def test_what_is_neither_folder_nor_hub_name_is_refused(
    reference: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        InputModels(tmp_path, folder=tmp_path).resolve(reference)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_a_folder_with_its_configuration(model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match=r"adapter: not a LoRA adapter: adapter_config\.json"):
        InputModels(tmp_path / "storage", folder=tmp_path).resolve(f"{model}+adapter")
    assert not (tmp_path / "storage").exists()


def test_an_adapted_model_is_made_once_and_again_when_the_adapter_changes(
    model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    inputs = InputModels(tmp_path / "storage", folder=model.parent, say=said.append)
    lora = write_adapter(tmp_path / "lora", seed=1)
    first = inputs.resolve(f"base+{lora}")
    assert first.parent == tmp_path / "storage" / "input_models"
    assert first.name.startswith("base-lora_")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert inputs.resolve(f"{model}+{lora}") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(said) == 1
    write_adapter(lora, seed=2)
    second = inputs.resolve(f"base+{lora}")
    assert second != first
    plain, adapted = tiny.read_tensors(model), tiny.read_tensors(second)
    changed = [name for name in plain if not torch.equal(plain[name], adapted[name])]
    assert changed == [f"{QUERY}.weight"]


def test_a_gguf_file_becomes_its_model_once(model: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "tiny.gguf")
    said: list[str] = []
    inputs = InputModels(tmp_path / "storage", dtype="bfloat16", say=said.append)
    made = inputs.resolve(str(file))
    assert made.name.startswith("tiny_")
    assert inputs.resolve(str(file)) == made
    assert len(said) == 1
    expected, found = tiny.read_tensors(model), tiny.read_tensors(made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(made).tokenize("ab c") == ["ab", "Ġ", "c"]


def test_what_several_references_mean_is_read_and_made_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(model, tmp_path / "tiny.gguf")
    (tmp_path / "same.gguf").symlink_to(file)
    lora, other = (write_adapter(tmp_path / name, seed=1) for name in ("lora", "other"))
    said: list[str] = []
    read: list[Path] = []
    digest = inputs_module._file_digest

    def digest_of(path: Path) -> str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(inputs_module, "_file_digest", digest_of)
    inputs = InputModels(tmp_path / "storage", folder=tmp_path, say=said.append)
    references = ["same.gguf", "tiny.gguf", str(file), f"tiny.gguf+{lora}", f"same.gguf+{other}"]
    folders, mistakes = inputs.resolve_all([*references, "nobody", *references])
    assert list(folders) == references
    assert folders["same.gguf"] == folders["tiny.gguf"] == folders[str(file)]
    assert [message.split()[0] for message in said] == ["de-quantising", "applying", "applying"]
    assert read.count(file) == 1
    assert list(mistakes) == ["nobody"]
    assert "neither a folder" in str(mistakes["nobody"])


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(ConfigError, match=r"broken\.gguf: cannot be read as GGUF"):
        InputModels(tmp_path / "storage", folder=tmp_path).resolve("broken.gguf")
    assert list((tmp_path / "storage" / "input_models").iterdir()) == []


def test_hub_repositories_of_a_reference_are_named_without_revision(
    model: Path, tmp_path: Path
) -> None:
    inputs = InputModels(tmp_path, folder=model.parent)
    assert inputs.hub_ids("base") == ()
    assert inputs.hub_ids("owner/name@v1.0") == ("owner/name",)
    assert inputs.hub_ids("owner/name@main+me/lora") == ("owner/name", "me/lora")
    assert inputs.hub_ids("base+me/lora") == ("me/lora",)


def test_a_hub_model_is_fetched_once_without_pickles_and_found_again_offline(
    model: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    files |= {"pytorch_model.bin": b"never", "original/more.safetensors": b"never"}
    files |= {"1_Pooling/config.json": b'{"pooling_mode_cls_token": true}'}
    storage = tmp_path / "storage"
    with hub({"me/base": files}) as (url, requests):
        first = resolve(storage, url, "me/base", "me/base@main", "me/none")
        lines = first.stdout.splitlines()
    kept = Path(lines[0])
    assert lines[1] == lines[0]
    assert kept.parent == storage / "input_models"
    assert {path.name for path in kept.iterdir()} == {path.name for path in model.iterdir()} | {
        "evomerge_origin.json",
        "1_Pooling",
    }
    assert b"cls_token" in (kept / "1_Pooling" / "config.json").read_bytes()
    assert (kept / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert "me/none: not a folder here, and the Hugging Face hub has no such model" in lines[2]
    fetched = [path for path in requests if path.endswith("safetensors")]
    assert set(fetched) == {f"/me/base/resolve/{COMMIT}/model.safetensors"}
    later = resolve(storage, url, "me/base")
    assert later.stdout.splitlines()[0] == str(kept)
    assert "me/base: the hub does not answer; using" in later.stderr


def test_a_hub_that_never_answers_is_given_up_once_for_all(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = resolve(tmp_path / "storage", address, "a/b", "c/d")
    first, second, seconds = run.stdout.splitlines()
    assert 2.0 <= float(seconds) < 4.0  # hub_seconds once, not once for each model
    assert first.startswith(
        "ConfigError a/b: not a folder here, and the Hugging Face hub does not answer"
    )
    assert second == "ConfigError c/d: not a folder here, and the hub did not answer before"
    assert not (tmp_path / "storage").exists()


def test_the_hub_is_given_up_within_eight_seconds() -> None:
    assert HUB_SECONDS == 5.0  # and, on a busy machine, almost 3 s to start and load its client


@pytest.mark.parametrize(
    ("status", "said"),
    [
        *((status, "hub has no such model for you") for status in (401, 403)),
        *((status, "hub does not answer") for status in (407, 429, 500)),
    ],
)
def test_only_a_refusal_means_that_the_hub_has_no_such_model(
    tmp_path: Path, status: int, said: str
) -> None:
    with hub({}, status=status) as (url, _):
        line = resolve(tmp_path / "storage", url, "me/none").stdout.splitlines()[0]
    assert f"me/none: not a folder here, and the Hugging Face {said}" in line


def test_what_was_fetched_is_used_while_the_hub_is_in_trouble(model: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    storage = tmp_path / "storage"
    with hub({"me/base": files}) as (url, _):
        kept = resolve(storage, url, "me/base").stdout.splitlines()[0]
    with hub({}, status=503) as (url, _):
        later = resolve(storage, url, "me/base", "me/none")
    lines = later.stdout.splitlines()
    assert lines[0] == kept
    assert "me/base: the hub does not answer; using" in later.stderr
    assert lines[1] == "ConfigError me/none: not a folder here, and the hub did not answer before"


def test_a_model_in_the_hubs_own_cache_is_found_without_the_hub(
    model: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    fetch = "import huggingface_hub as hub; hub.snapshot_download('me/base')"
    fetch += "; hub.snapshot_download('me/config', allow_patterns='config.json')"
    with hub({"me/base": files, "me/config": files}) as (url, _):
        environment = hub_environment(tmp_path, url)
        subprocess.run([sys.executable, "-c", fetch], env=environment, check=True)
    for storage, offline in (("unreachable", ""), ("offline", "1")):
        run = resolve(tmp_path / storage, url, "me/base", "me/config", HF_HUB_OFFLINE=offline)
        lines = run.stdout.splitlines()
        kept = Path(lines[0])
        assert kept.parent == tmp_path / storage / "input_models"
        assert tiny.read_tensors(kept).keys() == tiny.read_tensors(model).keys()
        assert "me/base: the hub does not answer; using" in run.stderr
        assert lines[1].startswith("ConfigError me/config: not a folder here")


def test_what_was_fetched_is_found_offline_beside_spoiled_folders(
    model: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    storage = tmp_path / "storage"
    with hub({"me/base": files}) as (url, _):
        kept = resolve(storage, url, "me/base").stdout.splitlines()[0]
    for name, text in (("a", "{"), ("b", "[]"), ("c", "{}"), ("d", '{"reference": "me/base"}')):
        (storage / "input_models" / name).mkdir()
        (storage / "input_models" / name / "evomerge_origin.json").write_text(text)
    (storage / "input_models" / "d" / "model.safetensors").symlink_to(tmp_path / "gone")
    assert resolve(storage, url, "me/base").stdout.splitlines()[0] == kept


def test_a_folder_with_a_plus_in_its_path_takes_an_adapter(model: Path, tmp_path: Path) -> None:
    plus = tmp_path / "a+b" / "c+d"
    plus.parent.mkdir()
    plus.symlink_to(model)
    lora = write_adapter(tmp_path / "lora+1", seed=1)
    inputs = InputModels(tmp_path / "storage", folder=tmp_path)
    made = inputs.resolve("a+b/c+d+lora+1")
    assert made == inputs.resolve(f"{model}+{lora}")
    assert inputs.hub_ids("a+b/c+d+me/lora") == ("me/lora",)
    assert inputs.hub_ids("a+b/c+d") == ()


def write_adapter(directory: Path, seed: int) -> Path:
    """A LoRA of rank 2 on one module, as PEFT saves it."""
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.{QUERY}.lora_A.weight": torch.randn(2, 128, generator=generator),
        f"base_model.model.{QUERY}.lora_B.weight": torch.randn(128, 2, generator=generator),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def write_gguf(model: Path, file: Path) -> Path:
    """A tiny Llama as llama.cpp's converter writes one: float32, q and k rows interleaved."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocabulary, key=lambda token: int(vocabulary[token]))
    writer.add_token_list([*tokens[:-1], "ab"])
    writer.add_token_types([3] * 5 + [1] * 256)  # 3: control, 1: normal
    writer.add_token_merges(["a b"])
    for kind, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{kind}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tiny.read_tensors(model).items():
        count = heads.get(name.split(".")[-2])
        rows = tensor.float()
        if count:
            rows = rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def hub_environment(folder: Path, endpoint: str) -> dict[str, str]:
    """A process's environment with the hub at `endpoint` and its cache in `folder`."""
    return {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hub_cache")}


def resolve(
    storage: Path, endpoint: str, *references: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Resolves in a process of its own: the hub's address is read when its client is imported."""
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, str(storage), *references],
        env=hub_environment(storage.parent, endpoint) | variables,
        capture_output=True,
        text=True,
        check=True,
    )


@contextmanager
def hub(
    repositories: Mapping[str, Mapping[str, bytes]], status: int = 404
) -> Iterator[tuple[str, list[str]]]:
    """A server with as much of the hub's interface as is needed: its address, its log.

    What it does not have it answers with `status`.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            body = self.body(path)
            self.send_response(200 if body is not None else status)
            if body is None and status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{abs(hash(path)):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body and body is not None:
                self.wfile.write(body)

        def body(self, path: str) -> bytes | None:
            for name, files in repositories.items():
                api, resolve = f"/api/models/{name}", f"/{name}/resolve/{COMMIT}/"
                if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                    siblings = [{"rfilename": file} for file in files]
                    return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
                if path.startswith(f"{api}/tree/"):
                    entries = [
                        {"type": "file", "path": file, "size": len(content), "oid": f"{index:x}"}
                        for index, (file, content) in enumerate(files.items())
                    ]
                    return json.dumps(entries).encode()
                if path.startswith(resolve):
                    return files.get(path.removeprefix(resolve))
            return None

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_local_paths_of_a_reference_are_its_models_and_its_adapters(
    model: Path, tmp_path: Path
) -> None:
    inputs = InputModels(tmp_path / "storage", folder=model.parent)
    lora = write_adapter(tmp_path / "lora", seed=1)
    assert inputs.local_paths(f"base+{lora}") == (model, lora)
    assert inputs.local_paths("owner/name+owner/adapter") == ()
