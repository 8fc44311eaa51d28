"""`[environment] auto_install`: the environment comes from its owner's index, whatever else has its name."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path

import pytest

from retrain.environment import verifiers
from retrain.types import ConfigError


def publish(index: Path, name: str, version: str, *lines: str) -> None:
    """A wheel of one module, which says where it comes from, in a package index in a folder."""
    folder = index / name.replace("_", "-")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = f"{name}-{version}-py3-none-any.whl"
    metadata = "\n".join(("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""))
    with zipfile.ZipFile(folder / wheel, "w") as file:
        info = f"{name}-{version}.dist-info"
        file.writestr(f"{name}.py", f"INDEX = {index.name!r}\n")
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    names = sorted(path.name for path in folder.glob("*.whl"))
    (folder / "index.html").write_text("".join(f'<a href="{each}">{each}</a>' for each in names))


@pytest.fixture
def indexes(tmp_path, monkeypatch):
    """(the owner's index on the hub, everybody's index); what pip installs goes into a folder of its own."""
    hub, everybody, target = tmp_path / "hub", tmp_path / "everybody", tmp_path / "target"
    owner = hub / "owner" / "simple"
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": everybody.as_uri(),
        "PIP_TARGET": str(target),
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(verifiers, "HUB", hub.as_uri())
    monkeypatch.syspath_prepend(str(target))
    return owner, everybody


def test_a_higher_version_of_the_name_elsewhere_is_not_taken(indexes):
    owner, everybody = indexes
    publish(owner, "retrain_probe_env", "1.0", "Requires-Dist: retrain-probe-helper")
    publish(everybody, "retrain_probe_env", "99.0")
    publish(everybody, "retrain_probe_helper", "2.0")
    verifiers._install("owner/retrain-probe-env", "retrain_probe_env", "place")
    module, helper = (importlib.import_module(f"retrain_probe_{name}") for name in ("env", "helper"))
    assert (module.INDEX, helper.INDEX) == ("simple", "everybody")


def test_what_its_owner_does_not_have_is_not_looked_for_elsewhere(indexes):
    _, everybody = indexes
    publish(everybody, "retrain_probe_env2", "1.0")
    with pytest.raises(ConfigError, match=r"^place: retrain-probe-env2 cannot be installed: .*"):
        verifiers._install("owner/retrain-probe-env2", "retrain_probe_env2", "place")
