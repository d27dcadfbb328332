"""Configuration of a router process: frozen, validated once. `roost route --help` shows it."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from roost_router.discovery.endpoint_slices import ServiceNameError, parse_service_name
from roost_router.policy.fair_queue import MAX_HELD
from roost_router.policy.registry import DEFAULT_POLICY
from roost_router.replica_url import ReplicaUrlError, check_replica_url, url_key


class ConfigError(ValueError):
    """An option cannot be served; the message says which and what to do."""


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All options of one router."""

    replicas: tuple[str, ...]  # base URLs, without /v1; for good
    replicas_file: Path | None = None  # lists more; discovery/file.py
    replicas_dns: tuple[str, ...] = ()  # URLs whose names have the replicas' addresses
    replicas_kubernetes: tuple[str, ...] = ()  # services: NAMESPACE/SERVICE[:PORT]
    replicas_redis: bool = False  # those that `roost register` tells of in the store
    host: str = "127.0.0.1"  # data port: clients
    port: int = 8000
    admin_host: str = "127.0.0.1"  # admin port: metrics, health; never on the data port
    admin_port: int = 9000
    poll_interval_s: float = 1.0  # shorter notices joins and deaths sooner, costs replicas a page
    poll_timeout_s: float = 5.0
    connect_timeout_s: float = 2.0
    policy: str = DEFAULT_POLICY  # who gets a request; policy/registry.py
    shadow: str | None = None  # a second policy, asked for each placement and never followed
    tokenizers: tuple[tuple[str, Path], ...] = ()  # by model: folders; none: no KV events
    tokenizer_workers: int = 1  # processes
    kv_index_mb: int = 256  # for what KV events tell, and what text it stands for
    max_attempts: int = 3  # replicas tried for a request before the first byte
    max_resumes: int = 3  # replicas tried for a stream after it
    max_body_bytes: int = 32 << 20
    max_requests: int = 16384  # being served at once; beyond: 503
    max_held: int = MAX_HELD  # of them, waiting for a replica that can start them, of each model
    max_connections: int = 32768  # of clients; fewer if the process may not open so many files
    max_connections_per_address: int = 16384  # one client, or one proxy, never takes all
    head_timeout_s: float = 10.0  # for a request's head, and for the first request
    body_stall_s: float = 30.0  # for more of a request's body
    keepalive_s: float = 75.0  # between requests
    write_stall_s: float = 30.0  # for a client to read more of its answer
    write_buffer_bytes: int = 256 << 10  # of a stream, before its replica is paused
    drain_s: float = 10.0  # how long streams may finish after SIGTERM
    drain_delay_s: float = 0.0  # what load balancers need to see that /ready is 503
    processes: int | None = None  # workers under a supervisor (supervisor.py); None: neither
    api_keys_file: Path | None = None  # hashes of the keys that open the data port; None: open
    api_keys_redis: bool = False  # those that `roost keys publish` has put into the store, too
    admin_keys_file: Path | None = None  # likewise the admin port, but /health and /ready
    replica_key_file: Path | None = None  # holds the key that replicas ask for
    redis: str | None = None  # URL of the store that routers share; None: this one is alone
    redis_secret_file: Path | None = None  # the cluster's secret: who has it, shares
    redis_password_file: Path | None = None
    redis_ca_file: Path | None = None  # whom to trust, where the URL says TLS
    insecure: bool = False  # other machines may come in without a key
    lifeline_fd: int | None = None  # stop when this descriptor reaches its end (parent died)
    listen_fd: int | None = None  # the data port's socket, if another process opened it
    admin_listen_fd: int | None = None  # likewise
    status_fd: int | None = None  # tells the supervisor what this worker does

    def __post_init__(self) -> None:
        """Refuse what could never work."""
        if not self.replicas and not self.discovers:
            raise ConfigError(
                "no replica given: pass its URL, or where replicas are found: --replicas-file, "
                "--replicas-dns, --replicas-kubernetes, --replicas-redis"
            )
        for url in (*self.replicas, *self.replicas_dns):
            try:
                check_replica_url(url)
            except ReplicaUrlError as error:
                raise ConfigError(str(error)) from None
        if len(set(map(url_key, self.replicas))) != len(self.replicas):
            raise ConfigError("a replica is given twice")
        self._check_discovery()
        models = [model for model, _ in self.tokenizers]
        if len(set(models)) != len(models):
            raise ConfigError("two tokenizers are given for one model")
        last_admin_port = self.admin_port + (self.processes or 1) - 1
        if last_admin_port > 65535:
            raise ConfigError(f"admin port {last_admin_port} does not exist: choose a lower first")
        is_admins = self.admin_port <= self.port <= last_admin_port
        if is_admins and self.port and self.host == self.admin_host:
            raise ConfigError(f"{self.port} is data and admin port: choose two")
        if self.redis is not None and self.redis_secret_file is None:
            raise ConfigError(
                "--redis needs --redis-secret-file: what routers keep there is sealed with it; "
                "make one with `head -c 32 /dev/urandom | base64 >FILE`"
            )
        if self.redis is None and (self.redis_secret_file or self.redis_password_file):
            raise ConfigError("--redis-secret-file and --redis-password-file are for --redis")
        if self.redis is None and self.replicas_redis:
            raise ConfigError("--replicas-redis needs --redis, where they register")
        if self.redis is None and self.api_keys_redis:
            raise ConfigError("--api-keys-redis needs --redis, where they are published")
        self.check_hosts(self.host, self.admin_host)

    @property
    def asks_for_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_keys_file is not None or self.api_keys_redis

    @property
    def discovers(self) -> bool:
        """Whether replicas are found elsewhere than among the options."""
        return bool(
            self.replicas_file
            or self.replicas_dns
            or self.replicas_kubernetes
            or self.replicas_redis
        )

    def _check_discovery(self) -> None:
        for url in self.replicas_dns:
            parts = urlsplit(url)
            if parts.scheme != "http" or parts.port is None:
                raise ConfigError(
                    f"--replicas-dns {url}: give it as http://name:port. certificates are of "
                    "names, and replicas found by DNS have addresses"
                )
        for text in self.replicas_kubernetes:
            try:
                parse_service_name(text)
            except ServiceNameError as error:
                raise ConfigError(f"--replicas-kubernetes: {error}") from None
        for option, given in (
            ("--replicas-dns", self.replicas_dns),
            ("--replicas-kubernetes", self.replicas_kubernetes),
        ):
            if len(set(given)) != len(given):
                raise ConfigError(f"{option} names one source twice")

    def check_hosts(self, host: str, admin_host: str) -> None:
        """ConfigError if other machines reach one of these addresses without a key."""
        if self.insecure:
            return
        if not self.asks_for_keys:
            check_open("--host", host, "--api-keys-file (see `roost keys new`)")
        if self.admin_keys_file is None:
            check_open("--admin-host", admin_host, "--admin-keys-file")


def activation_fd() -> int | None:
    """The data port's socket if systemd opened it (sd_listen_fds(3)): the first it passes."""
    environment = os.environ  # noqa: TID251 - systemd's protocol, no option of ours
    return 3 if environment.get("LISTEN_PID") == str(os.getpid()) else None


def kubernetes_api_url() -> str:
    """Where a pod reaches the API server. Raises ConfigError outside of one."""
    environment = os.environ  # noqa: TID251 - Kubernetes' protocol, no option of ours
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    port = environment.get("KUBERNETES_SERVICE_PORT_HTTPS", "443")
    if not host:
        raise ConfigError("--replicas-kubernetes: this is no pod of Kubernetes")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def check_open(option: str, host: str, cure: str = "") -> None:
    """ConfigError for an address of `option` that other machines reach: nobody is asked for a key.

    `cure`: the option that makes it ask.
    """
    if not is_loopback(host):
        keys = f"{cure}, or " if cure else ""
        raise ConfigError(
            f"{option} {host} lets other machines in without a key: pass {keys}--insecure if "
            "something before it asks for one"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`. Names other than localhost count as not."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
