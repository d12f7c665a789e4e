"""The doctor's round: every look with its judgement, none of which can keep the others from being made."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

from appliance.cli.doctor import judge_machine, judge_setup, probes
from appliance.cli.doctor.findings import Finding, Status, size
from appliance.core.clock import SystemClock
from appliance.core.errors import ApplianceError, NotFoundError
from appliance.core.settings import Settings
from appliance.observe import resources
from appliance.registry.catalog import open_catalog
from appliance.registry.gguf_header import read_header
from appliance.registry.install import PROGRAM_BYTES
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import open_registry
from appliance.security.keys import KeyStore
from appliance.store.database import Database
from appliance.store.inspection import OLDEST_SQLITE, inspect, sqlite_version
from appliance.web.exposure import check_exposure, is_loopback


@dataclass(frozen=True, slots=True)
class _WantedModel:
    """The model of the setting `model`, on this box or in the catalog."""

    name: str
    needed: int
    still_to_fetch: int


class Examination:
    """Looks at this machine as the settings would have it serve. Makes and changes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._llama_uses_gpu: bool | None = None

    def findings(self) -> Iterator[Finding]:
        """Yield each finding as it is made; the slow looks take seconds."""
        looks: dict[str, Callable[[], Finding]] = {
            "cpu": self._cpu,
            "memory": self._memory,
            "data folder": lambda: judge_setup.judge_folder(probes.folder(self._settings.data_dir)),
            "disk": self._disk,
            "sqlite": lambda: judge_setup.judge_sqlite(sqlite_version(), OLDEST_SQLITE),
            "database": self._database,
            "llama.cpp": self._llama,
            "gpu": self._gpu,
            "model": self._model,
            "threads": lambda: judge_setup.judge_threads(self._settings.threads, resources.physical_cores()),
            "exposure": self._exposure,
            "tls": self._tls,
            "port": self._port,
            "open files": self._open_files,
            "clock": self._clock,
            "systemd": lambda: judge_setup.judge_systemd(probes.systemd_runs()),
        }
        for name, look in looks.items():
            try:
                yield look()
            except ApplianceError as error:
                yield Finding(name, Status.FAILURE, error.message, error.advice or "See the message.")
            except OSError as error:
                found = f"could not be looked at: {error}."
                yield Finding(name, Status.FAILURE, found, "Try again as the user that runs the appliance, or as root.")

    def _cpu(self) -> Finding:
        return judge_machine.judge_cpu(
            resources.cpu_name(), platform.machine(), resources.cpu_features(), resources.physical_cores()
        )

    def _memory(self) -> Finding:
        return judge_machine.judge_memory(resources.memory())

    def _disk(self) -> Finding:
        try:
            still_to_fetch = self._wanted_model.still_to_fetch if self._wanted_model else 0
        except ApplianceError:
            still_to_fetch = 0  # the finding `model` tells of it
        return judge_machine.judge_disk(resources.disk(self._settings.data_dir), still_to_fetch)

    def _database(self) -> Finding:
        if not self._settings.database_path.exists():
            return Finding("database", Status.OK, "none yet; it is made at the first start.")
        with closing(self._open_database()) as database:
            report = inspect(database)
        if report.damage:
            return Finding(
                "database",
                Status.FAILURE,
                f"{self._settings.database_path} is damaged: {report.damage[0]}.",
                "Stop the appliance, keep a copy of the file, and restore it from a backup.",
            )
        rows = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.rows.items())
        version = f"schema version {report.schema_version}"
        if report.schema_version < report.newest_schema_version:
            version += f", brought to {report.newest_schema_version} at the next start"
        return Finding("database", Status.OK, f"sound, {size(report.size)}, {version}; {rows}.")

    def _llama(self) -> Finding:
        llama = probes.llama()
        self._llama_uses_gpu = llama.uses_gpu
        return judge_machine.judge_llama(llama.version, llama.features, resources.cpu_features(), platform.machine())

    def _gpu(self) -> Finding:
        return judge_machine.judge_gpu(resources.gpus(), self._llama_uses_gpu, self._settings.gpu_layers)

    def _model(self) -> Finding:
        model = self._wanted_model
        if model is None:
            return Finding("model", Status.OK, "none is loaded at start; each is on its first use.")
        return judge_machine.judge_model(
            model.name,
            model.needed,
            resources.memory(),
            cells=self._settings.context_cells,
            is_here=model.still_to_fetch == 0,
        )

    def _exposure(self) -> Finding:
        has_keys = False
        if self._settings.database_path.exists():
            with closing(self._open_database()) as database:
                has_keys = KeyStore(database, SystemClock()).has_keys()
        check_exposure(self._settings, has_keys)
        host = self._settings.host
        return judge_setup.judge_exposure(
            host, is_loopback=is_loopback(host), insecure=self._settings.insecure, has_keys=has_keys
        )

    def _tls(self) -> Finding:
        if self._settings.tls_certificate is None or self._settings.tls_key is None:
            return Finding("tls", Status.OK, "not set up.")
        problem = probes.tls_problem(self._settings.tls_certificate, self._settings.tls_key)
        return judge_setup.judge_tls(problem, self._settings.tls_key.stat().st_mode if not problem else 0)

    def _port(self) -> Finding:
        return judge_setup.judge_port(self._settings.host, self._settings.port, probes.port(self._settings))

    def _open_files(self) -> Finding:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return judge_setup.judge_open_files(limit, self._settings.max_connections)

    def _clock(self) -> Finding:
        return judge_setup.judge_clock(time.time(), probes.built(), probes.clock_is_synchronized())

    @cached_property
    def _wanted_model(self) -> _WantedModel | None:
        if not self._settings.model:
            return None
        registered = self._registered_model(self._settings.model)
        if registered is None:
            manifest = open_catalog(self._settings).find(self._settings.model).manifest
            return _WantedModel(manifest.full_name, manifest.minimum_memory, still_to_fetch=manifest.size)
        return _WantedModel(registered.full_name, self._needed(registered), still_to_fetch=0)

    def _registered_model(self, name: str) -> RegisteredModel | None:
        if not self._settings.database_path.exists():
            return None
        with closing(self._open_database()) as database:
            try:
                return open_registry(self._settings, database).resolve(name)
            except NotFoundError:
                return None

    def _needed(self, model: RegisteredModel) -> int:
        """Return the bytes for weights, KV cells as set, and the program; of an adapter, with its base."""
        if model.adapter:
            base = self._registered_model(model.base_name)
            return model.size + (self._needed(base) if base else 0)
        file = next(each for each in model.files if each.role == "model")
        kv_bytes = read_header(file.path).kv_bytes(self._settings.context_cells, self._settings.kv_cache_type)
        return model.size + kv_bytes + PROGRAM_BYTES

    def _open_database(self) -> Database:
        return Database(self._settings.database_path, read_only=True)
