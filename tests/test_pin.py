"""A model is what its digest covers, and no file that came with a model is run as code."""

import ast
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedvlm
from families import folder as family
from fedvlm.config import load
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.deploy.site import Site
from fedvlm.errors import FedVLMError
from fedvlm.models import folder as folders
from fedvlm.models import load as loading
from fedvlm.models.pin import pin, unchanged

RUN = load({"algorithm": {"name": "plora"}})
TRAP = """
import os
open(os.environ["FEDVLM_TRAP"], "w").close()
class Trap:
    pass
"""


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(loading.BUNDLED["tiny"], tmp_path / "model"))


def policy(folder, digest):
    return Policy(models={"tiny": {"path": str(folder), "sha256": digest}})


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def other_weights(model, path):
    """Writes weights of the same shapes and other values."""
    tree = {n: t * 1.5 for n, t in load_file(model / "model.safetensors").items()}
    path.parent.mkdir(exist_ok=True)
    save_file(tree, path, {"format": "pt"})
    return tree


def test_the_digest_is_the_one_that_sha256sum_prints(model):
    (model / "templates").mkdir()
    (model / "templates" / "a.jinja").write_text("x")
    (model / ".cache").mkdir()
    (model / ".cache" / "download.lock").touch()  # the hub's downloader leaves such files
    shell = "find . -name '.?*' -prune -o -type f -printf '%P\\n' | LC_ALL=C sort"
    sums = f"{shell} | xargs sha256sum | sha256sum"
    said = subprocess.run(sums, shell=True, cwd=model, capture_output=True, text=True, check=True)
    assert pin(model).digest == said.stdout.split()[0]


@pytest.mark.parametrize("name", sorted(os.listdir(loading.BUNDLED["tiny"])))
def test_a_changed_byte_in_any_file_that_is_loaded_is_refused(name, model, tmp_path):
    allowed = policy(model, pin(model).digest)
    assert allowed.localized(RUN, "rows", tmp_path).model.name == str(model)
    content = bytearray((model / name).read_bytes())
    content[-1] ^= 1 if name.endswith(".safetensors") else 0
    (model / name).write_bytes(content + (b"" if name.endswith(".safetensors") else b"\n"))
    with pytest.raises(Refused, match=r"model 'tiny' is not the one in the policy .*digest") as why:
        Site("site-0", RUN, "rows", tmp_path / "state", allowed)
    assert str(tmp_path) not in str(why.value), "the server does not learn the site's paths"


def decoy(model):
    """The pinned weights under another name, and an index that names others, in a subfolder."""
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    tree = other_weights(model.parent / "good", model / "w" / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tree, "w/other.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(model):
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    torch.save(load_file(model / "decoy.safetensors"), model / "pytorch_model.bin")


def adapter(model):
    about = {"peft_type": "LORA", "base_model_name_or_path": str(model.parent / "good")}
    (model / "adapter_config.json").write_text(json.dumps(about))


def elsewhere(model):
    other_weights(model, model.parent / "evil" / "model.safetensors")
    edit(model / "config.json", transformers_weights="../evil/model.safetensors")


def hidden(model):
    decoy(model)
    (model / "w").rename(model / ".w")
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("w/other", ".w/other"))


def tokenizer_elsewhere(model):
    edit(model / "tokenizer_config.json", tokenizer_file="/tmp/other/tokenizer.json")


def linked(model):
    (model.parent / "other").mkdir()
    (model / "templates").symlink_to(model.parent / "other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (decoy, "the digest of its folder is"),
        (pickled, "'pytorch_model.bin'.* safetensors only"),
        (adapter, "adapter_config.json"),
        (elsewhere, "config.json has 'transformers_weights'"),
        (hidden, "index names '.w/other.safetensors'"),
        (tokenizer_elsewhere, "tokenizer_config.json has 'tokenizer_file'"),
        (linked, "a link to another folder"),
    ],
)
def test_other_weights_beside_the_pinned_ones_are_refused(change, said, model, tmp_path):
    digest = pin(model).digest
    shutil.copytree(model, tmp_path / "good")
    change(model)
    with pytest.raises(Refused, match=said) as why:
        policy(model, digest).localized(RUN, "rows", tmp_path)
    assert str(tmp_path) not in str(why.value)


def test_links_to_files_are_followed_as_in_the_cache_of_the_hub(model, tmp_path):
    digest = pin(model).digest
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    assert pin(model).digest == digest
    (tmp_path / "link").symlink_to(model)
    assert pin(tmp_path / "link").digest == digest


def test_weights_that_were_other_ones_only_while_they_were_loaded_are_refused(
    model, tmp_path, monkeypatch
):
    config = policy(model, pin(model).digest).localized(RUN, "rows", tmp_path)
    file = model / "model.safetensors"
    loading.load_model(config.model)

    def swapped(*args, source=loading.load_processor, **kwargs):
        stat, good = file.stat(), file.read_bytes()
        other_weights(model, file)
        file.write_bytes(good)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return source(*args, **kwargs)

    monkeypatch.setattr(loading, "load_processor", swapped)
    with pytest.raises(FedVLMError, match=r"changed after .*model\.safetensors"):
        loading.load_model(config.model)


def test_a_file_that_is_added_or_put_in_place_of_another_is_a_change(model):
    before = pin(model)
    unchanged(before)
    (model / "merges.txt").touch()
    with pytest.raises(FedVLMError, match="changed after"):
        unchanged(before)


def test_a_model_of_the_hub_without_a_digest_is_allowed_and_reported(caplog, tmp_path):
    fixed = f"a/b@{'0f' * 20}"  # a commit, whose files stay the same
    hub = Policy(models={"a/b": "a/b", "tiny": "tiny", "fixed": fixed})
    run = RUN.model_copy(update={"model": RUN.model.model_copy(update={"name": "a/b"})})
    assert hub.localized(run, "rows", tmp_path).model.name == "a/b"
    assert "whoever controls that repository" in caplog.text
    caplog.clear()
    hub.localized(RUN, "rows", tmp_path)
    run = RUN.model_copy(update={"model": RUN.model.model_copy(update={"name": "fixed"})})
    assert hub.localized(run, "rows", tmp_path).model.name == fixed
    assert not caplog.records


# Code of a model


DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
TRAPS = {
    "config.json": {"model_type": "trap", "auto_map": {
        "AutoConfig": "trap.Trap", "AutoModelForImageTextToText": "trap.Trap"}},
    "generation_config.json": {"auto_map": {"AutoModel": "trap.Trap"}},
    "processor_config.json": {"processor_class": "TrapProcessor", "auto_map": {
        "AutoProcessor": "trap.Trap"}},
    "preprocessor_config.json": {"image_processor_type": "Trap", "auto_map": {
        "AutoImageProcessor": "trap.Trap", "AutoProcessor": "trap.Trap"}},
    "video_preprocessor_config.json": {"video_processor_type": "Trap", "auto_map": {
        "AutoVideoProcessor": "trap.Trap"}},
    "tokenizer_config.json": {"tokenizer_class": "TrapTokenizer", "auto_map": {
        "AutoTokenizer": ["trap.Trap", "trap.Trap"]}},
}  # fmt: skip


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Makes a model with a video part, one of whose files names code beside it."""

    def asked(*_):
        (tmp_path / "asked").touch()
        return "y"

    def made(name):
        path = Path(shutil.copytree(family("qwen2_vl"), tmp_path / "trap"))
        (path / "trap.py").write_text(TRAP)
        file = path / name
        if name == "preprocessor_config.json":  # the older layout, one file for each part
            (path / "processor_config.json").unlink()
            edit(path / "tokenizer_config.json", processor_class="Qwen2VLProcessor")
        file.write_text(file.read_text() if file.exists() else "{}")
        edit(file, **TRAPS[name])
        return path

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setenv("FEDVLM_TRAP", str(tmp_path / "sprung"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return made


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_beside_a_model_is_refused_and_neither_run_nor_asked_about(name, trap, tmp_path):
    folder = trap(name)
    with pytest.raises(FedVLMError, match=f"custom code \\(auto_map.*{name}|{name}.*custom code"):
        loading.load_model(load({"model": {"name": str(folder)}}).model)
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_transformers_itself_is_told_not_to_run_the_code_of_a_model(
    name, trap, tmp_path, monkeypatch
):
    """As for a model of the hub, whose files fedvlm does not read first."""
    monkeypatch.setattr(loading, "refuse_own_code", lambda folder: None)
    monkeypatch.setattr(folders, "_has_code", lambda document: False)
    folder, config = trap(name), {"device": "cpu"}
    for read in (loading.load_model, loading.load_shapes):
        with contextlib.suppress(FedVLMError):
            read(load({"model": {"name": str(folder), **config}}).model)
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "sprung").exists()


def test_an_attention_from_the_hub_is_refused(model):
    edit(model / "config.json", _attn_implementation="kernels-community/flash-attn")
    with pytest.raises(FedVLMError, match=r"kernels-community/flash-attn.* custom code"):
        loading.load_model(load({"model": {"name": str(model)}}).model)


def test_every_load_says_that_no_code_of_a_model_may_run():
    """``from_pretrained`` and ``from_config`` of transformers ask on a terminal by default."""
    unsaid, found = [], 0
    for file in sorted(Path(fedvlm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("from_pretrained", "from_config", "pipeline"):
                found += 1
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if said.get("trust_remote_code") != "False":
                    unsaid.append(f"{file.name}:{node.lineno}")
            if node.func.attr in ("load_dataset", "load_dataset_builder"):
                assert not {"trust_remote_code"} & {k.arg for k in node.keywords}
    assert unsaid == []
    assert found >= 6


def test_a_data_set_with_a_script_is_refused_and_not_run(tmp_path, monkeypatch):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.py").write_text(TRAP)
    monkeypatch.setenv("FEDVLM_TRAP", str(tmp_path / "sprung"))
    with pytest.raises(Exception, match=r"(?i)script|no .*data files"):
        datasets.load_dataset_builder(str(rows))
    assert not (tmp_path / "sprung").exists()
