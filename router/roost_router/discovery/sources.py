"""The sources that the options of a router name."""

from __future__ import annotations

from random import Random

from roost_router.config import ConfigError, RouterConfig, kubernetes_api_url
from roost_router.discovery.dns import DnsSource
from roost_router.discovery.endpoint_slices import parse_service_name
from roost_router.discovery.file import FileSource, read_replicas
from roost_router.discovery.kubernetes import KubernetesSource
from roost_router.discovery.replicas_file import ReplicasFileError
from roost_router.discovery.source import Source


def make_sources(config: RouterConfig, rng: Random) -> list[Source]:
    """All of them. Raises ConfigError, for a bad file too: there is no good one before it."""
    sources: list[Source] = []
    if config.replicas_file is not None:
        try:
            read_replicas(config.replicas_file)
        except ReplicasFileError as error:
            raise ConfigError(f"--replicas-file: {error}") from None
        sources.append(FileSource(config.replicas_file))
    sources += [DnsSource(url) for url in config.replicas_dns]
    for text in config.replicas_kubernetes:
        service = parse_service_name(text)
        sources.append(KubernetesSource(service, kubernetes_api_url(), rng))
    return sources
