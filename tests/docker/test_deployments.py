# SPDX-License-Identifier: Apache-2.0
"""compose*.yaml and kubernetes.yaml: valid by their schemas, their commands by the real parsers, their parts fit."""

import argparse
import copy
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"]
KUBERNETES_VERSIONS = ("1.30", "1.37")
helpers = runpy.run_path(str(Path(__file__).with_name("image.py")))


def substituted(text: str) -> str:
    """${NAME:-default} as compose does without the variable, then $$ as $."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")


@pytest.fixture
def services() -> dict:
    return yaml.safe_load(COMPOSE[0].read_text())["services"]


@pytest.fixture
def objects() -> dict:
    return {found["kind"]: found for found in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())}


@pytest.fixture
def serve_parser() -> argparse.ArgumentParser:
    """Of `vllm serve`, our formats included."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


def compose_schema(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def test_compose_schema():
    done = compose_schema(*COMPOSE)
    assert done.returncode == 0, done.stdout


def test_compose_schema_finds_faults(tmp_path):
    (tmp_path / "compose.yaml").write_text(COMPOSE[0].read_text().replace("restart:", "restarts:"))
    assert compose_schema(tmp_path / "compose.yaml").returncode == 1


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_schema(version, objects):
    for found in objects.values():
        kubernetes_validate.validate(found, version, strict=True)
    broken = copy.deepcopy(objects["Deployment"])
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def check_calibration(shell: list[str], environ: dict) -> None:
    """sh -ec 'test -d "$MODEL" || hf download "$MODEL"; kvcompress calibrate "$MODEL" --if-missing'"""
    import importlib

    from vllm_kvcompress import cli

    *shell, text = shell
    assert shell == ["sh", "-ec"] and environ["MODEL"]
    download, calibrate = text.replace("$MODEL", environ["MODEL"]).split("; ")
    assert shlex.split(download) == ["test", "-d", environ["MODEL"], "||", "hf", "download", environ["MODEL"]]
    program, command, *arguments = shlex.split(calibrate)
    assert (program, command) == ("kvcompress", "calibrate")
    parser = argparse.ArgumentParser()
    importlib.import_module(cli._COMMANDS[command]).add_arguments(parser)
    parsed = parser.parse_args(arguments)
    # Without --out: into the volume that the image's VLLM_KVCOMPRESS_CACHE names, by the fingerprint of the weights.
    assert parsed.if_missing and parsed.model == environ["MODEL"] and parsed.out is None


def test_compose_commands(services, serve_parser):
    calibrate, server = services["calibrate"], services["server"]
    model = substituted(calibrate["environment"]["MODEL"])
    check_calibration([*calibrate["entrypoint"], *map(substituted, calibrate["command"])], {"MODEL": model})
    parsed = serve_parser.parse_args(["serve", *map(substituted, server["command"])])
    assert (parsed.model_tag, parsed.kv_cache_dtype, parsed.max_model_len) == (model, "oscar-int2", 8192)
    assert server["depends_on"]["calibrate"]["condition"] == "service_completed_successfully"


def test_compose_volumes(services):
    """The calibration writes where the server reads; every named volume is declared and every file is there."""
    assert services["calibrate"]["volumes"] == ["models:/models", "rotations:/rotations"]
    assert services["server"]["volumes"] == ["models:/models", "rotations:/rotations:ro"]
    declared = yaml.safe_load(COMPOSE[0].read_text())["volumes"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in declared


def test_compose_images(services):
    """Built from our Dockerfiles, or pinned."""
    for path in COMPOSE:
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            if "build" in service:
                assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            elif name in services:
                assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])


def test_kubernetes_deployment(objects, serve_parser):
    environ = objects["ConfigMap"]["data"]
    assert (environ["HF_HOME"], environ["VLLM_KVCOMPRESS_CACHE"]) == ("/models", "/rotations")
    pod = objects["Deployment"]["spec"]["template"]
    (calibrate,), (server,) = pod["spec"]["initContainers"], pod["spec"]["containers"]
    check_calibration(calibrate["command"], environ)
    parsed = serve_parser.parse_args(
        ["serve", *(word.replace("$(MODEL)", environ["MODEL"]) for word in server["args"])]
    )
    assert (parsed.model_tag, parsed.kv_cache_dtype) == (environ["MODEL"], "oscar-int2")
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    for container in (calibrate, server):
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} <= volumes
        assert mounts["/rotations"].get("readOnly", False) is (container is server)
        assert container["envFrom"] == [{"configMapRef": {"name": objects["ConfigMap"]["metadata"]["name"]}}]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": server["ports"][0]["name"]}
    security = pod["spec"]["securityContext"]
    (user,) = (value for name, value in helpers["instructions"](DOCKER / "Dockerfile") if name == "USER")
    assert security["runAsNonRoot"] and str(security["runAsUser"]) == user
    assert objects["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
