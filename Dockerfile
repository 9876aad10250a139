# docker build -t dape-serve .                                # for CPUs
# docker build -t dape-serve:cuda --build-arg DEVICE=cuda .   # for NVIDIA GPUs
FROM python:3.11-slim AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# pip goes on without the C++ library, an image does not: a wheel without it has another name.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel . \
    && ls /wheel/*-py3-none-linux_*.whl

FROM python:3.11-slim
ARG DEVICE=cpu
# tini: as process 1 Python would not hear SIGTERM while it starts. A C compiler: Triton builds a launcher with it
# before a GPU kernel first runs.
# hadolint ignore=DL3008
RUN case "$DEVICE" in \
        cpu) set -- ;; \
        cuda) set -- gcc libc6-dev ;; \
        *) echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 1 ;; \
    esac \
    && apt-get update \
    && apt-get install --yes --no-install-recommends tini "$@" \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home dape
COPY constraints.txt /tmp/
# PyTorch has a layer of its own below ours: it is most of the image and changes seldom. PyPI's builds bring CUDA
# along, those of PyTorch's index do not. Headers and tests of C++ are of no use here.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN if [ "$DEVICE" != cpu ]; then unset TORCH_INDEX; fi \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && torch="$(python -c 'import torch; print(torch.__path__[0])')" \
    && rm -rf "$torch/include" "$torch/test" "$torch"/bin/test_*
ARG EXTRAS=otel
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    if [ "$DEVICE" != cpu ]; then EXTRAS="$EXTRAS,$DEVICE"; fi \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "$(echo /wheel/*.whl)[$EXTRAS]"

# Waiting OpenMP threads sleep instead of spinning, so that a busy neighbour does not stall the engine. What Triton
# compiles is written where there is room, even if nothing else can be written.
ENV OMP_WAIT_POLICY=PASSIVE \
    TRITON_CACHE_DIR=/tmp/triton \
    DAPE_HOST=0.0.0.0 \
    DAPE_PORT=8000
USER 10001
WORKDIR /home/dape
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=15s --timeout=5s CMD ["python", "-c", \
    "from os import environ; from urllib.request import urlopen; urlopen(f'http://127.0.0.1:{environ[\"DAPE_PORT\"]}/health', timeout=5)"]
ENTRYPOINT ["tini", "--", "dape"]
CMD ["serve"]
