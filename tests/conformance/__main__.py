"""Run the upstream tests of pod networks on clusters whose pod network is Drawbridge.

``python -m tests.conformance [IPv4] [IPv6]``: on a cluster of two nodes that has this family first, or on one of each.
Reports go to ``build/conformance``; the exit status is 1 where a test did not pass or did not run.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.api.processes import run
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import ROOT, install
from tests.conformance import report
from tests.conformance.parts import LEFT_OUT, PARTS
from tests.tools.build import binary, version

REPORTS = ROOT / "build" / "conformance"
# Whether a cluster has IPv6 first.
FAMILIES = {"IPv4": False, "IPv6": True}
# Above four, two cores are full, and probes of three seconds begin to fail.
_PROCESSES = 4
_MINUTES = 20
_REPORT = "ginkgo.xml"


def main(families: list[str]) -> int:
    """Run on a cluster of each family and print what came out; returns the exit status."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    runs, wrong = [], []
    for family in families:
        folder = Path(tempfile.mkdtemp(prefix="drawbridge-conformance-"))
        print(f"{family}: on a cluster of two nodes; logs stay in {folder}", flush=True)
        with Cluster(folder / "cluster", ipv6_first=FAMILIES[family]) as cluster:
            install(cluster)
            _load_images(cluster)
            started = time.monotonic()
            status = _ginkgo(cluster, folder)
            seconds = time.monotonic() - started
        results = report.read_suite(folder / _REPORT)
        done = report.Run(_circumstances(family), seconds, {part.title: part.of(results) for part in PARTS})
        report.write(done, REPORTS / f"{family.lower()}.xml")
        runs.append(done)
        wrong += [f"{family}: {line}" for part in PARTS for line in part.shortcomings(done.parts[part.title])]
        if status:
            wrong.append(f"{family}: ginkgo ended with {status}")
    print(report.table(runs), *(done.sentence() for done in runs), *wrong, f"reports: {REPORTS}", sep="\n")
    return 1 if wrong else 0


def _ginkgo(cluster: Cluster, folder: Path) -> int:
    """Run the parts of the suite, whose report is written to the folder; ginkgo says meanwhile how it goes."""
    options = [
        f"--procs={_PROCESSES}",
        f"--timeout={_MINUTES}m",
        f"--focus={'|'.join(part.focus for part in PARTS)}",
        f"--skip={LEFT_OUT}",
        f"--output-dir={folder}",
        f"--junit-report={_REPORT}",
        "--no-color",
        "--silence-skips",
    ]
    suite = [
        "--provider=skeleton",
        f"--num-nodes={len(cluster.nodes)}",
        f"--kubeconfig={cluster.control_plane.kubeconfig}",
        f"--kubectl-path={binary('kubectl')}",
        "--dump-logs-on-failure=false",
    ]
    # In a pid namespace: what ginkgo starts ends with it, also where it is killed.
    alone = ("unshare", "--pid", "--fork", "--kill-child")
    words: list[str | Path] = [*cluster.enter, *alone, binary("ginkgo"), *options, binary("e2e.test"), "--", *suite]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def _load_images(cluster: Cluster) -> None:
    """Give the machines what the suite's pods are made of, under the names that it asks for."""
    with tempfile.TemporaryDirectory() as scratch:
        cluster.load_image(images.agnhost(Path(scratch), image=_image("agnhost")))
        cluster.load_image(images.busybox(Path(scratch), image=_image("busybox")))


def _image(program: str) -> str:
    """The newest of the names under which the suite asks for an image."""
    names = [name for name in run(binary("e2e.test"), "--list-images").split() if f"/{program}:" in name]
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name.rpartition(":")[2])])


def _circumstances(family: str) -> dict[str, str]:
    kernel = ".".join(platform.release().split(".")[:2])
    return {
        "addresses": f"{family} first",
        "kubernetes": f"Kubernetes {version()}",
        "kernel": f"{platform.system()} {kernel}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(FAMILIES)))
