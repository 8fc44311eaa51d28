"""What the core installs: complete, within the declared ranges, under known licences, with no known vulnerability.

    python scripts/audit_dependencies.py [--strict]

The first three are answered by the environment itself. The last one asks osv.dev, through pip-audit, about everything
that is installed; where it cannot be asked, that is said and is no failure, so that `make check` does not hang on a
network. A vulnerability that is found fails with --strict only (`make audit`): one is published every day, and most are
in what is installed for the tests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OSV = "https://api.osv.dev/v1/query"
SECONDS = 10
# A licence that would bind what is built on this project.
REFUSED = ("AGPL", "Affero", "GPL-2", "GPL-3", "GPLv2", "GPLv3", "General Public License")
LESSER = ("LGPL", "Lesser General Public")


def closure(root: str) -> tuple[dict[str, Distribution], list[str]]:
    """Every distribution that `root` requires here, by canonical name; a line for each requirement that is not met."""
    found: dict[str, Distribution] = {}
    problems = []
    waiting = [("this environment", Requirement(root))]
    seen = set()
    while waiting:
        owner, wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        try:
            there = distribution(wanted.name)
        except PackageNotFoundError:
            problems.append(f"{owner} needs {wanted}, which is not installed")
            continue
        if not wanted.specifier.contains(there.version, prereleases=True):
            problems.append(f"{owner} needs {wanted}, installed is {there.version}")
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found[name] = there
        needs = [Requirement(line) for line in there.requires or ()]
        extras = ("", *wanted.extras)
        waiting += [
            (name, need)
            for need in needs
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return found, problems


def licence(found: Distribution) -> str:
    """What its metadata says, "" where they say nothing."""
    facts = found.metadata
    classifiers = [line for line in facts.get_all("Classifier") or () if line.startswith("License ::")]
    stated = facts["License-Expression"] or " / ".join(classifiers) or facts["License"] or ""
    return " ".join(stated.split())[:200]


def licence_problems(found: dict[str, Distribution]) -> Iterator[str]:
    for name, each in found.items():
        stated = licence(each)
        if not stated:
            yield f"{name}: its metadata names no licence"
        elif any(word in stated for word in REFUSED) and not any(word in stated for word in LESSER):
            yield f"{name}: {stated}"


def vulnerabilities(osv_url: str, *options: str) -> list[str] | None:
    """A line for each that is known of what is installed; None where nobody could be asked."""
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    command += ["-s", "osv", "--osv-url", osv_url, "--timeout", str(SECONDS), *(options or ["--local"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["pip-audit says nothing"])[-1]
        print(f"not asked: known vulnerabilities ({reason:.200})")
        return None
    return [
        f"{each['name']} {each['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'none yet'}"
        for each in dependencies
        for flaw in each.get("vulns", ())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strict", action="store_true", help="fail for a vulnerability, and where nobody could be asked"
    )
    parser.add_argument("--osv-url", default=OSV, help="where to ask")
    given = parser.parse_args()
    found, missing = closure("retrain")
    problems = [*missing, *licence_problems(found)]
    for line in problems:
        print(f"problem: {line}")
    if not problems:
        print(f"{len(found)} packages of the core: all within their ranges, all under known licences")
    flaws = vulnerabilities(given.osv_url)
    for line in flaws or ():
        print(f"vulnerable: {line}")
    if flaws == []:
        print("no known vulnerability in what is installed")
    return 1 if problems or (given.strict and flaws != []) else 0


if __name__ == "__main__":
    sys.exit(main())
