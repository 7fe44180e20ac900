"""Every setting, declared once: flag, environment variable (HNEURONS_*), yaml key, help and check.

A flag wins over the environment, that over the file of `--config`, that over the default. Nothing
below server/app.py sees this object. API keys are no flag, because a flag shows in the list of
processes: they come from HNEURONS_API_KEYS or as hashes from `--api-key-file`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from probes.errors import HNeuronsError

ENVIRONMENT_PREFIX = "HNEURONS_"


class BadSettingsError(HNeuronsError):
    """A setting is wrong; the message names it and says what is expected."""


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(word for part in value.split(",") if (word := part.strip()))


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]  # repeat, or comma-separated


class Settings(BaseSettings):
    """Serve MODEL with a hallucination risk for every token, over the OpenAI API."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_show_env_vars=True,
    )

    model: CliPositionalArg[str] = Field("", description="hub id, folder, or `demo`")
    config: Path | None = Field(None, description="yaml file with any of these settings")
    engine: Literal["transformers", "vllm", "fake"] = Field(
        "transformers",
        description="what runs the model; `vllm` is for production (`make vllm`), `fake` has no "
        "weights and is for tests",
    )
    vllm_args: str = Field(
        "",
        description="for `--engine vllm`: any of its own arguments that have no option here, in "
        "one string",
    )

    reasoning_parser: str | None = Field(
        None,
        description="what of a chat answer is reasoning, in vLLM's words (`deepseek_r1`, `qwen3`, "
        "..); engines other than vllm know `deepseek_r1`",
    )
    tool_call_parser: str | None = Field(
        None,
        description="serve tools, and find their calls in vLLM's words (`hermes`, `llama3_json`, "
        "..); engines other than vllm know `hermes`",
    )

    probe: Words = Field(
        (),
        description="probe by shipped name, folder or `org/name@COMMIT`, repeatable, the first is "
        "the default; "
        "`none` for no probe (default: the shipped one for `demo`, else none)",
    )
    risk_by_default: bool = Field(False, description="answer with risk unless a request says no")
    suppression: bool | None = Field(
        None,
        description="allow requests to set alpha (default: yes; with --engine vllm no, since it is "
        "compiled into the model's graph and every token pays for it)",
    )

    revision: str | None = Field(
        None, pattern="^[0-9a-f]{40}$", description="commit of a hub id, 40 hex digits"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto: as the model was saved"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ..; auto: cuda if there is one")
    max_model_len: int | None = Field(
        None, ge=2, description="tokens, prompt and answer together (default: the model's own)"
    )
    max_num_seqs: int = Field(16, ge=1, description="requests that decode together")
    max_waiting_requests: int = Field(64, ge=0, description="beyond it: 429")
    max_waiting_tokens: int = Field(65_536, ge=0, description="waiting prompt tokens; beyond: 429")
    prefix_cache_tokens: int = Field(
        0,
        ge=0,
        description="tokens of the latest prompts whose keys and values are kept for prompts that "
        "begin alike; in bfloat16 these may be answered in other words than when they are read as "
        "a whole (engine transformers; vLLM has its own)",
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="0: any free port")
    metrics_port: int | None = Field(
        None, ge=0, le=65_535, description="serve /metrics there instead, without a key"
    )
    root_path: str = Field("", pattern="^(/[^/]+)*$", description="prefix a proxy strips, `/x`")
    ssl_keyfile: Path | None = Field(None, description="TLS key (PEM)")
    ssl_certfile: Path | None = Field(None, description="TLS certificate chain (PEM)")
    allowed_origins: Words = Field((), description="origins that browsers may call from (CORS)")
    api_key_file: Path | None = Field(
        None, description="sha256 of each API key, one hex digest a line; `#` begins a comment"
    )
    playground: bool | None = Field(
        None, description="serve the page at / (default: on a loopback address without keys)"
    )
    served_model_name: str | None = Field(
        None,
        pattern=r"^[\w./:@+-]{1,128}$",
        description="`model` of requests and answers (default: MODEL, of a folder its name)",
    )

    drain_delay: float = Field(
        2.0, ge=0, description="seconds after SIGTERM in which new requests still get a 503"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds for open requests to finish")
    heartbeat: float = Field(
        60.0, gt=0, description="seconds without a step that mean the engine hangs"
    )
    audit_log: Path | None = Field(
        None, description="append one JSON line per answer to this file: probe, alpha, result"
    )
    audit_text: bool = Field(False, description="with the text that went out")
    audit_max_bytes: int = Field(
        104_857_600, ge=4096, description="a larger audit log is renamed and a new one begun"
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        pattern=r"^https?://.+/v1/traces$",
        description="OTLP/HTTP address of traces, `http://collector:4318/v1/traces`; events go to "
        "/v1/logs beside it (needs the extra `otel`)",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="of the JSON lines on stderr"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if not self.model:
            raise ValueError("MODEL is missing: give a hub id, a folder, or `demo`")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile belong together: give both or none")
        if self.vllm_args and self.engine != "vllm":
            raise ValueError("vllm_args: only `--engine vllm` takes them")
        if self.engine == "vllm" and (self.device != "auto" or self.prefix_cache_tokens):
            raise ValueError(
                "device, prefix_cache_tokens: `--engine vllm` has its own; see its --vllm-args"
            )
        if self.audit_text and self.audit_log is None:
            raise ValueError("audit_text: there is no audit_log to write it to")
        if "none" in self.probe and len(self.probe) > 1:
            raise ValueError("probe: `none` cannot stand beside other probes")
        return self

    @property
    def allows_alpha(self) -> bool:
        """Requests may scale neurons."""
        return self.engine != "vllm" if self.suppression is None else self.suppression

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ConfigFile(settings_cls)


class Secrets(BaseSettings):
    """What must not stand on a command line or in a file of settings."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX)

    api_keys: SecretStr | None = None  # comma-separated


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from flags, environment and file; BadSettingsError in one line.

    `--help` and unknown flags end the process, as argparse does (exit codes 0 and 2).
    """
    try:
        return CliApp.run(Settings, cli_args=list(arguments))
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in finding["loc"])
        reason = finding["msg"].removeprefix("Value error, ")
        raise BadSettingsError(f"{name}: {reason}" if name else reason) from error
    except SettingsError as error:
        raise BadSettingsError(str(error)) from error


class _ConfigFile(PydanticBaseSettingsSource):
    """The yaml file that a flag or the environment named; unknown keys are refused later."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("the file is read as a whole, by __call__")

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadSettingsError(f"config: cannot read {str(path)!r}: {_line(error)}") from error
        if content is None:
            return {}
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise BadSettingsError(f"config: {str(path)!r} must hold `setting: value` lines")
        return {key.replace("-", "_"): value for key, value in content.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
