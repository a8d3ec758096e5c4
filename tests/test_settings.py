# ruff: noqa: E501 - a case a line reads best
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gemma_serve.settings import (
    ServerSettings,
    Settings,
    SettingsError,
    fields,
    load_with_sources,
    source_of,
    variable_name,
)


def load(environ: dict[str, str] | None = None, **kwargs: object) -> Settings:
    return Settings.load(environ=environ or {}, **({"env_file": None} | kwargs))  # type: ignore[arg-type]


def test_defaults() -> None:
    settings = load()
    assert settings.model.name == "google/gemma-2b-it"
    assert settings.model.id == "gemma-2b-it"
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8000)


def test_precedence_is_command_line_environment_dotenv_yaml_default(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("server: {port: 1, host: yaml, max_body_bytes: 2000}\nmodel: {name: yaml/m}\n")
    dotenv = tmp_path / ".env"
    dotenv.write_text("GEMMA_SERVER_PORT=2\nGEMMA_SERVER_HOST=dotenv\nGEMMA_MODEL_NAME=dotenv/m\n")
    environ = {"GEMMA_SERVER_PORT": "3", "GEMMA_SERVER_HOST": "environment"}
    settings, sources = load_with_sources(
        config=config, env_file=dotenv, environ=environ, overrides={"server": {"port": "4"}}
    )
    assert settings.server.port == 4
    assert settings.server.host == "environment"
    assert settings.model.name == "dotenv/m"
    assert settings.server.max_body_bytes == 2000
    assert [source_of("server", name, sources) for name in ("port", "host", "max_body_bytes", "workers")] == [
        "command line",
        "environment",
        str(config),
        "default",
    ]
    assert source_of("model", "name", sources) == str(dotenv)


def test_config_file_named_by_the_environment(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("log: {level: debug}\n")
    assert load({"GEMMA_CONFIG": str(config)}).log.level == "DEBUG"


def test_the_tree_is_frozen() -> None:
    settings = load()
    with pytest.raises(ValidationError):
        settings.server.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.server = settings.server  # type: ignore[misc]


def test_lists_are_comma_lists() -> None:
    settings = load(
        {
            "GEMMA_SECURITY_ALLOWED_ORIGINS": "https://a.example, http://localhost:3000",
            "GEMMA_MODEL_ALIASES": '["gpt-4o-mini"]',
        }
    )
    assert settings.security.allowed_origins == ("https://a.example", "http://localhost:3000")
    assert settings.model.aliases == ("gpt-4o-mini",)


def test_engine_values_get_the_type_that_vllm_wants() -> None:
    settings = load(
        {
            "GEMMA_ENGINE_MAX_NUM_SEQS": "64",
            "GEMMA_ENGINE_GPU_MEMORY_UTILIZATION": "0.8",
            "GEMMA_ENGINE_ENFORCE_EAGER": "true",
            "GEMMA_ENGINE_KV_CACHE_DTYPE": "fp8",
            "GEMMA_ENGINE_REVISION": "123",
            "GEMMA_ENGINE_SPECULATIVE_CONFIG": '{"method": "ngram"}',
        }
    )
    assert settings.engine == {
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.8,
        "enforce_eager": True,
        "kv_cache_dtype": "fp8",
        "revision": "123",
        "speculative_config": {"method": "ngram"},
    }


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"GEMMA_SEVRER_PORT": "1"}, "GEMMA_SEVRER_PORT (environment): no such setting; did you mean GEMMA_SERVER_PORT?"),
        ({"GEMMA_SERVER_PROT": "1"}, "did you mean server.port?"),
        ({"GEMMA_PORT": "1"}, "GEMMA_PORT (environment): no such setting"),
        ({"GEMMA_ENGINE_MAX_NUM_SEQ": "1"}, "engine.max_num_seq is not an argument of vLLM's engine; did you mean max_num_seqs?"),
        ({"GEMMA_ENGINE_MODEL": "x"}, "set model.name in place of engine.model"),
        ({"GEMMA_SERVER_PORT": "http"}, "server.port (GEMMA_SERVER_PORT, from environment) = 'http': must be a valid integer"),
        ({"GEMMA_SERVER_PORT": "70000"}, "must be less than or equal to 65535"),
        ({"GEMMA_SERVER_WORKERS": "2"}, "must be 1: each worker would load an engine"),
        ({"GEMMA_LOG_LEVEL": "loud"}, "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ({"GEMMA_PERFORMANCE_DEVICE": "tpu"}, "must be 'auto', 'cuda' or 'cpu'"),
        ({"GEMMA_SECURITY_ALLOWED_ORIGINS": "example.com"}, "is not an origin"),
        ({"GEMMA_SECURITY_API_KEY_REQUIRED": "true"}, "there are no keys, so nobody could get in"),
        ({"GEMMA_SECURITY_PUBLIC_PATHS": "docs"}, "is not a path"),
        ({"GEMMA_SECURITY_TRUSTED_PROXIES": "10.0.0.1/8"}, "is not an address or network"),
        ({"GEMMA_CACHE_MODE": "sampled"}, "'deterministic' or 'all'"),
        ({"GEMMA_ENGINE_MAX_NUM_SEQS": "lots"}, "engine.max_num_seqs = 'lots' should be int"),
        ({"GEMMA_ENGINE_ENFORCE_EAGER": "maybe"}, "should be bool"),
        ({"GEMMA_ENGINE_KV_CACHE_DTYPE": "@x"}, "GEMMA_ENGINE_KV_CACHE_DTYPE, from environment"),
        ({"GEMMA_MODEL_CHAT_TEMPLATE": "/nowhere.jinja"}, "not point to a file"),
        ({"GEMMA_CONFIG": "nowhere.yaml"}, "no such configuration file: nowhere.yaml; the presets are"),
        ({"GEMMA_SERVER": "x"}, "GEMMA_SERVER (environment): no such setting"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_explained(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(environ)
    assert sentence in str(caught.value)


def test_an_empty_value_is_no_value(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("engine:\n# max_num_seqs: 5\n")
    settings = load({"GEMMA_MODEL_MAX_LENGTH": "", "GEMMA_ENGINE_MAX_NUM_SEQS": ""}, config=config)
    assert settings == load()


def test_a_dotenv_that_is_not_text(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(b"GEMMA_MODEL_NAME=\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load(env_file=dotenv)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"GEMMA_SERVER_PORT": "x", "GEMMA_LOG_FORMAT": "xml", "GEMMA_NO_SUCH": "1"})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("server: [1]\n", "server = [1]"),
        ("- 1\n", "must hold sections"),
        ("a: [", "cannot be read as YAML"),
        ("sever: {port: 1}\n", "no such section; did you mean server?"),
        ("server: {prot: 1}\n", "did you mean server.port?"),
        ("engine: {max_num_seq: 1}\n", "did you mean max_num_seqs?"),
        ("engine: 5\n", "engine"),
        ("1: {a: b}\n", "is not a name"),
        ("engine: {5: 1}\n", "is not a name"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, sentence: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(config=config)
    assert sentence in str(caught.value)


def test_what_kubernetes_injects_is_ignored() -> None:
    settings = load(
        {
            "GEMMA_SERVER_PORT": "tcp://10.0.0.1:80",
            "GEMMA_SERVER_SERVICE_HOST": "10.0.0.1",
            "GEMMA_SERVER_SERVICE_PORT": "80",
            "GEMMA_SERVER_SERVICE_PORT_HTTP": "80",
            "GEMMA_SERVER_PORT_80_TCP": "tcp://10.0.0.1:80",
            "GEMMA_SERVER_PORT_80_TCP_ADDR": "10.0.0.1",
            "GEMMA_SERVER_PORT_80_TCP_PROTO": "tcp",
            "GEMMA_SERVE_METRICS_PORT": "tcp://10.0.0.2:9090",
            "GEMMA_SERVICE_HOST": "10.0.0.3",
            "GEMMA_PORT": "tcp://10.0.0.3:80",
        }
    )
    assert settings.server.port == 8000


def test_every_setting_says_what_it_does() -> None:
    for section, field, info in fields():
        assert info.description, f"{variable_name(section, field)} has no docstring"


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8000"),
        ({"host": "fd00::7", "port": 80}, "http://[fd00::7]:80"),
        ({"host": "::", "tls_certificate": __file__, "tls_private_key": __file__}, "https://[::1]:8000"),
    ],
)
def test_where_a_server_answers_on_its_own_machine(server: dict[str, Any], url: str) -> None:
    assert ServerSettings(**server).local_url == url
