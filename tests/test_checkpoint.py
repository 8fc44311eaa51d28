"""Checkpoints: whole or not at all, found again whatever a crash left behind, named when damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest

from faults import dying_everywhere, failing_everywhere, small_disk
from retrain.training import checkpoint
from retrain.training.checkpoint import CHECKPOINTS, LOOP_STATE, TRAINER_STATE, TrainerState
from retrain.types import ConfigError


def state(step):
    return TrainerState(
        seed=3,
        step=step,
        prompts_used=8 * step,
        policy_version=step,
        completion_tokens=1000 * step,
        sepa={"ema": 0.1 + step, "updates": step},
        recent_correct=[0.25] * min(step, 10),
    )


def weights(step):
    return f"weights of {step}\n".encode() * 400


def save(step):
    def into(folder):
        (folder / "adapter.bin").write_bytes(weights(step))

    return into


def write(log_dir, *steps, keep=0):
    for step in steps:
        checkpoint.write(log_dir, state(step), save(step), keep=keep)


def find(path):
    said = []
    found = checkpoint.find(path, said.append)
    return found, said


def refusal(path):
    with pytest.raises(ConfigError) as error:
        checkpoint.find(path, lambda line: None)
    return str(error.value)


def assert_whole(found, step):
    """It is the checkpoint of `step`, and what it holds is what was written then."""
    assert found.state == state(step)
    assert found.folder.name == f"step_{step:06d}"
    assert (found.folder / "adapter.bin").read_bytes() == weights(step)


def names(log_dir):
    return sorted(path.name for path in (log_dir / CHECKPOINTS).iterdir())


def folder(log_dir, step):
    return log_dir / CHECKPOINTS / f"step_{step:06d}"


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints of steps 2, 4 and 6."""
    log_dir = tmp_path / "run"
    log_dir.mkdir()
    write(log_dir, 2, 4, 6)
    return log_dir


def harm(run, step, damage):
    path = folder(run, step)
    content = bytearray(weights(step))
    match damage:
        case "no manifest":
            (path / "manifest.json").unlink()
        case "manifest cut short":
            (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:50])
        case "truncated":
            (path / "adapter.bin").write_bytes(content[:-1])
        case "zero length":
            (path / "adapter.bin").write_bytes(b"")
        case "bit flipped":
            content[1234] ^= 4
            (path / "adapter.bin").write_bytes(content)
        case "missing file":
            (path / LOOP_STATE).unlink()
        case "missing folder":
            shutil.rmtree(path)


DAMAGES = {
    "no manifest": "manifest.json is missing",
    "manifest cut short": "manifest.json is unreadable or altered",
    "truncated": "adapter.bin has",
    "zero length": "adapter.bin has 0 of",
    "bit flipped": "adapter.bin does not match its checksum",
    "missing file": "loop.json is missing",
}


# ---------------------------------------------------------------- writing


def test_what_was_written_is_found(run):
    found, said = find(run)
    assert_whole(found, 6)
    assert found.log_dir == run
    assert said == []
    assert json.loads((run / TRAINER_STATE).read_text()) == {"checkpoint": "checkpoints/step_000006", "step": 6}
    assert json.loads((found.folder / LOOP_STATE).read_text()) == asdict(state(6))


@pytest.mark.parametrize(("keep", "left"), [(0, [2, 4, 6, 8]), (1, [8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])])
def test_keep(run, keep, left):
    write(run, 8, keep=keep)
    assert names(run) == [f"step_{step:06d}" for step in left]
    assert_whole(find(run)[0], 8)


def test_steps_sort_as_numbers(run):
    write(run, 999_999, 1_000_000, keep=2)
    assert names(run) == ["step_1000000", "step_999999"]
    (run / TRAINER_STATE).unlink()
    assert find(run)[0].state == state(1_000_000)


def test_the_disk_fails_at_any_call(run):
    """Whatever fails while step 8 is written, the run goes on from step 6 or, once it is in place, from step 8."""
    reached = []
    for _ in failing_everywhere(lambda _: write(run, 8, keep=3)):
        assert not [name for name in names(run) if name.startswith(".")], "nothing half-written is left"
        found, said = find(run)
        reached.append(found.state.step)
        assert_whole(found, reached[-1])
        assert said == []
        shutil.rmtree(folder(run, 8), ignore_errors=True)
        write(run, 2, 4, 6)
    assert set(reached) == {6, 8}
    assert reached == sorted(reached)
    assert reached.count(6) > 10
    assert_whole(find(run)[0], 8)


def test_the_process_dies_at_any_call(run):
    reached = []
    for _ in dying_everywhere(lambda _: write(run, 8, keep=3)):
        found, said = find(run)
        reached.append(found.state.step)
        assert_whole(found, reached[-1])
        assert said == []
        checkpoint.go_back(run, 6)
        assert names(run) == ["step_000002", "step_000004", "step_000006"]
        write(run, 6)
    assert set(reached) == {6, 8}
    assert_whole(find(run)[0], 8)
    assert names(run) == ["step_000004", "step_000006", "step_000008"]


def test_what_the_backend_raises_passes_through_and_nothing_is_left(run):
    def fails(folder):
        save(8)(folder)
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        checkpoint.write(run, state(8), fails, keep=1)
    assert names(run) == ["step_000002", "step_000004", "step_000006"]
    assert_whole(find(run)[0], 6)


def test_full_disk(tmp_path):
    """A real one: it fills up after some steps, the last whole checkpoint stays, and with room the run goes on."""
    with small_disk(tmp_path / "disk", "96k") as disk:
        with pytest.raises(OSError, match="No space left"):
            write(disk, *range(1, 50))
        found, said = find(disk)
        reached = found.state.step
        assert 1 <= reached < 49
        assert_whole(found, reached)
        assert said == []
        assert names(disk) == [f"step_{step:06d}" for step in range(1, reached + 1)]
        shutil.rmtree(folder(disk, 1))
        shutil.rmtree(folder(disk, 2))
        write(disk, reached + 1)
        assert_whole(find(disk)[0], reached + 1)


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_newer_folder_that_is_half_written_is_passed_over(run, damage):
    """trainer_state.json still names step 6: the crash came while step 8 was written."""
    before = (run / TRAINER_STATE).read_bytes()
    write(run, 8)
    (run / TRAINER_STATE).write_bytes(before)
    harm(run, 8, damage)
    found, said = find(run)
    assert_whole(found, 6)
    assert len(said) == 1
    assert str(folder(run, 8)) in said[0]
    assert DAMAGES[damage] in said[0]


def test_a_newer_folder_that_is_complete_is_taken(run):
    before = (run / TRAINER_STATE).read_bytes()
    write(run, 8)
    (run / TRAINER_STATE).write_bytes(before)
    assert_whole(find(run)[0], 8)


@pytest.mark.parametrize("damage", [*DAMAGES, "missing folder"])
def test_damage_to_the_named_one_is_named_and_a_good_one_offered(run, damage):
    harm(run, 6, damage)
    harm(run, 4, "bit flipped")
    message = refusal(run)
    assert str(folder(run, 6)) in message
    assert DAMAGES.get(damage, "is missing") in message
    assert message.endswith(f"--resume {folder(run, 2)}")
    found, _ = find(folder(run, 2))
    assert_whole(found, 2)
    assert found.log_dir == run


def test_no_good_one_is_left(run):
    for step in (2, 4, 6):
        harm(run, step, "truncated")
    message = refusal(run)
    assert "No good one is left" in message
    assert message.endswith(f"Start anew with: retrain {run}/config.toml --log-dir {run}-again")


def test_a_newer_one_is_offered_where_no_older_one_is_good(run):
    harm(run, 2, "truncated")
    assert refusal(folder(run, 2)).endswith(f"--resume {folder(run, 6)}")


def test_the_copy_of_the_config_takes_the_place_of_a_lost_one(run):
    checkpoint.write(run, state(8), save(8), keep=0, beside={"config.toml": b"[training]\n"})
    spare = folder(run, 8) / "config.toml"
    assert checkpoint.spare_config(run) == spare
    assert checkpoint.go_on(run) == f"Go on with: retrain {spare} --resume {run}"
    (run / "config.toml").write_text("")
    assert checkpoint.go_on(run) == f"Go on with: retrain {run}/config.toml --resume {run}"
    spare.write_text("altered")
    assert "config.toml has 7 of 11 bytes" in refusal(run)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"checkpoint": 6}',
        b'{"checkpoint": "checkpoints/latest", "step": 6}',
        b'{"checkpoint": "checkpoints/step_000006"}',
        b'{"checkpoint": "checkpoints/step_000006", "step": 4}',
        b'{"checkpoint": "checkpoints/step_000006", "step": "6"}',
    ],
)
def test_trainer_state_is_missing_or_garbage(run, content):
    """Then the newest complete folder is the one."""
    (run / TRAINER_STATE).unlink()
    if content is not None:
        (run / TRAINER_STATE).write_bytes(content)
    assert checkpoint.named(run) is None
    found, said = find(run)
    assert_whole(found, 6)
    assert said == [f"{run / TRAINER_STATE} is missing or damaged: going by the newest complete checkpoint"]
    harm(run, 6, "zero length")
    found, said = find(run)
    assert_whole(found, 4)
    assert str(folder(run, 6)) in said[1]
    harm(run, 4, "no manifest")
    harm(run, 2, "no manifest")
    message = refusal(run)
    assert "none of its 3 checkpoints is complete" in message
    assert TRAINER_STATE in message


def test_a_checkpoint_folder_given_directly(run, monkeypatch):
    there = run / CHECKPOINTS
    for path in (there / "step_000004", there / ".." / CHECKPOINTS / "step_000004"):
        found, _ = find(path)
        assert_whole(found, 4)
        assert found.log_dir == run
    (run / "best").symlink_to(folder(run, 2))
    assert_whole(find(run / "best")[0], 2)
    monkeypatch.chdir(run / CHECKPOINTS)
    relative, _ = find(checkpoint.Path("step_000002"))
    assert_whole(relative, 2)
    assert relative.log_dir.resolve() == run.resolve()
    harm(run, 4, "bit flipped")
    assert f"--resume {folder(run, 2)}" in refusal(folder(run, 4))


def test_folders_without_a_checkpoint(tmp_path, run):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "no such folder" in refusal(tmp_path / "file")
    for path in (tmp_path, run / CHECKPOINTS):
        message = refusal(path)
        assert "there is no checkpoint in it" in message
        assert "log_dir" in message
    (tmp_path / "new" / CHECKPOINTS / ".unfinished_step_000000").mkdir(parents=True)
    assert "there is no checkpoint in it" in refusal(tmp_path / "new")


def test_a_checkpoint_of_another_version(run):
    values = asdict(state(6)) | {"colour": "red"}
    del values["sepa"]
    (folder(run, 6) / LOOP_STATE).write_text(json.dumps(values))
    checkpoint.durable.seal(folder(run, 6), step=6)
    message = refusal(run)
    assert "another version" in message
    assert "colour, sepa" in message


# ---------------------------------------------------------------- going on


def test_go_back(run):
    (run / CHECKPOINTS / ".unfinished_step_000008").mkdir()
    checkpoint.go_back(run, 4)
    assert names(run) == ["step_000002", "step_000004"]
    assert_whole(find(run)[0], 4)


def test_the_process_dies_while_it_goes_back(run):
    """Then it goes on from the checkpoint that it wanted, or from the one that it had: with what either needs."""
    reached = []
    for _ in dying_everywhere(lambda _: checkpoint.go_back(run, 2)):
        found, _ = find(run)
        reached.append(found.state.step)
        assert_whole(found, reached[-1])
        write(run, 2, 4, 6)
    assert reached == sorted(reached, reverse=True)
    assert {4, 6} <= set(reached)
    assert_whole(find(run)[0], 2)


def test_prune(run):
    checkpoint.prune(run, 0)
    assert names(run) == ["step_000002", "step_000004", "step_000006"]
    checkpoint.prune(run, 2)
    assert names(run) == ["step_000004", "step_000006"]


def test_what_somebody_put_beside_the_checkpoints_is_left_alone(run):
    """A copy under another name is neither found as the newest, nor counted, nor removed."""
    shutil.copytree(folder(run, 2), run / CHECKPOINTS / "step_000006_before_the_crash")
    shutil.copytree(folder(run, 2), run / CHECKPOINTS / "step_best")
    assert_whole(find(run)[0], 6)
    checkpoint.go_back(run, 4)
    write(run, 6, keep=1)
    assert names(run) == ["step_000006", "step_000006_before_the_crash", "step_best"]
