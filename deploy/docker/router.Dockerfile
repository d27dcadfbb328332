# The router, its data path compiled, without torch:
#   docker build -f deploy/docker/router.Dockerfile -t roost/router .
ARG PYTHON=3.11-slim-bookworm
FROM python:${PYTHON} AS build
# A C compiler for the wheel; it stays behind in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY deploy/compile_router.py deploy/
COPY router router
COPY engine engine
COPY kernels kernels
COPY loadtest loadtest
# redis: several routers act as one. tokens: KV events are followed.
ARG EXTRAS=redis,tokens
RUN python -m venv /opt/roost \
    && /opt/roost/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" \
    && PYTHONSAFEPATH=1 /opt/roost/bin/python -c "from roost_router.compiled import is_compiled; assert is_compiled()"

FROM python:${PYTHON}
COPY --from=build /opt/roost /opt/roost
# By number, so that Kubernetes can tell that it is not root.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin roost
USER 10001:10001
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# 8000: clients. 9000: health, metrics, dashboard.
EXPOSE 8000 9000
# Alive, not ready: a router without replicas is no reason to restart it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD \
    ["/opt/roost/bin/python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9000/health', timeout=2)"]
ENTRYPOINT ["/opt/roost/bin/roost"]
CMD ["route", "--help"]
