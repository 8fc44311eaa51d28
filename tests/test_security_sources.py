"""What no source of the package may do, and what a checkpoint may hold: no pickle is read, nothing is evaluated."""

from __future__ import annotations

import ast
import io
import pickle
from pathlib import Path

import pytest
import torch

import tiny_models as models
from retrain.backend import trainer_state
from retrain.types import ConfigError, RetrainError

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "retrain").rglob("*.py"), *(ROOT / "kernels/retrain_kernels").rglob("*.py")])

# Each of them can run what is in the data that it reads.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "imp"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "torch.package",
    "torch.hub.load",
    "torch.jit.load",
    "np.load",
    "numpy.load",
    "pandas.read_pickle",
    "os.system",
    "os.popen",
}


# An archive decides by these where its files go.
METHODS = {"extractall", "unpack_archive"}


def name_of(node: ast.expr) -> str:
    """ "torch.load" of the expression torch.load; "" for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = name_of(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def forbidden(source: str) -> list[str]:
    """What the source does that it must not, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [(node.lineno, n.name) for n in names if n.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                found.append((node.lineno, module))
            case ast.ImportFrom(module="torch" | "numpy" | "os", names=names):
                found += [(node.lineno, f"{node.module}.{n.name}") for n in names if f"{node.module}.{n.name}" in CALLS]
            case ast.Call(func=func, keywords=keywords):
                if name_of(func) in CALLS:
                    found.append((node.lineno, name_of(func)))
                if isinstance(func, ast.Attribute) and func.attr in METHODS:
                    found.append((node.lineno, func.attr))
                for keyword in keywords:
                    value = getattr(keyword.value, "value", None)
                    if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and value is True:
                        found.append((node.lineno, f"{keyword.arg}=True"))
                    if keyword.arg in ("weights_only", "use_safetensors", "verify") and value is False:
                        found.append((node.lineno, f"{keyword.arg}=False"))
    return [f"line {line}: {what}" for line, what in found]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import yaml.loader",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, use_safetensors=False)",
        "httpx2.Client(verify=False)",
        "from os import system",
        "tarfile.open(path).extractall(folder)",
    ],
)
def test_the_search_finds(source):
    assert forbidden(source)


def test_the_search_lets_pass():
    assert forbidden("model.eval()\nre.compile('a')\ntorch.nn.Module.load(x)\nf(trust_remote_code=keys.trust)") == []


def test_no_source_reads_pickles_or_evaluates_text():
    assert len(SOURCES) > 100
    found = {str(path.relative_to(ROOT)): forbidden(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def is_pickle(content: bytes) -> bool:
    """Whether it begins as a pickle of protocol 2 or later, or as the archive that torch.save puts one into."""
    return content[:1] == b"\x80" or content[:2] == b"PK"


def test_a_backend_saves_nothing_that_could_run(open_local, tmp_path):
    backend = open_local()
    backend.step(models.random_batch(0, [3], [[4, 4]]), 0)
    backend.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert trainer_state.TRAINER_STATE in names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".md"}
    assert not [path for path in tmp_path.iterdir() if is_pickle(path.read_bytes())]
    buffer = io.BytesIO()
    torch.save({}, buffer)
    assert is_pickle(buffer.getvalue()) and is_pickle(pickle.dumps({}))


class Trap:
    """Unpickling it makes a folder: whoever reads it runs what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (Path.mkdir, (self.folder,))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", trainer_state.TRAINER_STATE])
def test_a_pickle_in_the_place_of_a_checkpoints_file_is_not_read(open_local, tmp_path, name):
    backend = open_local()
    checkpoint, caught = tmp_path / "checkpoint", tmp_path / "caught"
    checkpoint.mkdir()
    backend.save(checkpoint)
    (checkpoint / name).write_bytes(pickle.dumps(Trap(caught)))
    with pytest.raises(RetrainError, match=f"{name} is damaged"):
        backend.load(checkpoint)
    assert not caught.exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert caught.exists()


def test_an_adapter_that_is_a_pickle_is_not_read(open_local, tmp_path):
    backend = open_local()
    backend.save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(RetrainError, match=r"there is no adapter_model\.safetensors"):
        backend.load_adapter(tmp_path)


def test_a_checkpoint_without_a_trainers_state_is_said(open_local, tmp_path):
    backend = open_local()
    backend.save(tmp_path)
    (tmp_path / trainer_state.TRAINER_STATE).unlink()
    with pytest.raises(RetrainError, match=r"holds no trainer\.safetensors"):
        backend.load(tmp_path)


def test_weights_in_a_pickle_are_not_read(open_local, model_folder, tmp_path):
    folder, caught = tmp_path / "model", tmp_path / "caught"
    models.save_model("gpt2", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(caught)))
    with pytest.raises(ConfigError, match=r"has no safetensors weights .* pickles"):
        open_local("gpt2", model__model=str(folder))
    assert not caught.exists()


CODE = """
from pathlib import Path
from transformers import {config}, {model}
Path({marker!r}).touch()
class OwnConfig({config}):
    model_type = "own"
class OwnModel({model}):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path):
    """A model whose code leaves a file when it runs; (folder, that file)."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    models.save_model("gpt2", folder)
    (folder / "own.py").write_text(CODE.format(config="GPT2Config", model="GPT2LMHeadModel", marker=str(ran)))
    config = (folder / "config.json").read_text().replace('"model_type": "gpt2"', '"model_type": "own"')
    places = '"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},'
    (folder / "config.json").write_text(config.replace("{", "{" + places, 1))
    return folder, ran


def test_a_models_own_code_does_not_run_unasked(open_local, with_code, monkeypatch):
    folder, ran = with_code
    # Were the question asked on the terminal, this would be the answer.
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(ConfigError, match=r"Python code of its own.*model\.trust_remote_code = true"):
        open_local("gpt2", model__model=str(folder))
    assert not ran.exists()


def test_a_models_own_code_runs_where_it_is_trusted(open_local, with_code, monkeypatch, tmp_path):
    folder, ran = with_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    backend = open_local("gpt2", model__model=str(folder), model__trust_remote_code=True)
    assert ran.exists() and type(backend.policy.lm).__name__ == "OwnModel"
