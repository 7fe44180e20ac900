# syntax=docker/dockerfile:1
# Two targets: `cpu`, and `cuda` with vLLM. Everything is installed while the image is built; a
# container needs the network only for a model that is not in its cache volume.
#   docker build --target cpu -t hneurons:0.1.0-cpu .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL -p 8000:8000 -v hneurons-cache:/cache hneurons:0.1.0-cpu demo
# Pin the base by digest where you build: --build-arg PYTHON=python:3.11-slim-bookworm@sha256:..
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python -m venv /app
COPY requirements/image.txt requirements/torch.txt requirements/vllm-gpu.txt requirements/
RUN /app/bin/pip install --require-hashes --no-deps -r requirements/image.txt
COPY pyproject.toml README.md LICENSE ./
COPY probes probes
COPY server server
COPY offline offline
RUN /app/bin/pip install --no-build-isolation --no-deps .

# torch comes last: its build decides the target. TORCH_INDEX names an index of CPU builds; without
# it the default one is asked, whose Linux builds carry CUDA.
FROM build AS build-cpu
ARG TORCH_INDEX=
RUN /app/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r requirements/torch.txt

FROM build AS build-cuda
RUN /app/bin/pip install -r requirements/torch.txt -r requirements/vllm-gpu.txt

FROM ${PYTHON} AS runtime
# uid 10001 owns nothing but the cache and the audit folder; the root file system may be read-only.
RUN useradd --uid 10001 --create-home --home-dir /cache --shell /usr/sbin/nologin hneurons \
 && install --directory --owner 10001 --group 10001 /audit
ENV PATH=/app/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HNEURONS_HOST=0.0.0.0 \
    HNEURONS_CACHE=/cache/hneurons \
    HF_HOME=/cache/huggingface
USER 10001:10001
WORKDIR /cache
VOLUME ["/cache", "/audit"]
EXPOSE 8000 9400
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["hneurons-serve"]
CMD ["demo", "--metrics-port", "9400"]

FROM runtime AS cuda
USER 0:0
# Triton compiles its driver when the engine starts.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /app /app

FROM runtime AS cpu
COPY --from=build-cpu /app /app
