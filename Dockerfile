# The images of HSCR: gateway, worker and engine. docs/deploy-docker.md says what each is for.
#
#   docker build --target gateway --tag hscr-gateway:0.1.0 .
#
# Needs BuildKit. Wheels in requirements/wheels are found before the package index's, so that a machine that
# reaches none can build: `pip download` fills that folder elsewhere.

# Any Debian 12. For a build that can be repeated, name it by its digest.
ARG BASE=debian:bookworm-slim
# One time for all files that a build writes, whenever that is.
ARG SOURCE_DATE_EPOCH=1577836800

# ---- what every image stands on: Debian and its Python 3.11, security updates included -------------------
# hadolint ignore=DL3006
FROM ${BASE} AS python
ARG DEBIAN_FRONTEND=noninteractive
ARG SOURCE_DATE_EPOCH
# Debian's mirrors keep no superseded versions: a pinned one would soon not build.
# hadolint ignore=DL3008
RUN --mount=type=bind,source=deploy/timeless.sh,target=/tmp/timeless.sh /tmp/timeless.sh "apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3.11 \
    && rm -rf /var/lib/apt/lists/* /var/cache/ldconfig/aux-cache /var/log/apt/* /var/log/*.log"

# ---- tools, none of which reach an image -----------------------------------------------------------------
FROM python AS tools
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils python3-pip \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
ARG SOURCE_DATE_EPOCH
# Bytecode without the columns of its source.
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} \
    PYTHONNODEBUGRANGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY deploy/install.sh /deploy/
# Without pip: nothing that installs packages is left in an image.
RUN python3.11 -m venv --without-pip /opt/hscr

# ---- this project, in a folder and so a layer of its own ------------------------------------------------
FROM tools AS project
RUN python3.11 -m venv --without-pip /opt/build
RUN --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca-certificates \
    /deploy/install.sh /opt/build build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY hscr hscr
COPY service service
COPY workers workers
RUN pip --python /opt/build/bin/python wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheel . \
    && pip --python /opt/hscr/bin/python install --no-cache-dir --no-compile --no-index --no-deps \
        --target /opt/project /wheel/*.whl

# ---- dependencies, each lock in a layer of its own -------------------------------------------------------
FROM tools AS gateway-packages
RUN --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca-certificates \
    /deploy/install.sh /opt/hscr gateway
COPY deploy/finish.py deploy/warm.py deploy/layers.sh /deploy/
RUN python3.11 /deploy/finish.py /opt/hscr
COPY --from=project /opt/project /opt/project
RUN PYTHONPATH=/opt/project /opt/hscr/bin/python /deploy/warm.py /opt/hscr /opt/project \
    && /deploy/layers.sh

FROM tools AS worker-packages
# cpu or cuda: which build of torch, with what it needs.
ARG TORCH=cpu
RUN --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=ca-certificates \
    /deploy/install.sh /opt/hscr worker "torch-${TORCH}"
COPY deploy/finish.py deploy/warm.py deploy/layers.sh /deploy/
RUN python3.11 /deploy/finish.py /opt/hscr
COPY --from=project /opt/project /opt/project
RUN MODEL=/opt/project/hscr/models/phantom/weights PYTHONPATH=/opt/project \
    /opt/hscr/bin/python /deploy/warm.py /opt/hscr /opt/project \
    && /deploy/layers.sh

# ---- what all processes share ----------------------------------------------------------------------------
FROM python AS runtime
# A number, so that Kubernetes can tell that it is not root. State lies under /data and /tmp only.
ARG SOURCE_DATE_EPOCH
RUN --mount=type=bind,source=deploy/timeless.sh,target=/tmp/timeless.sh /tmp/timeless.sh "groupadd --gid 10001 hscr \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp hscr \
    && install --directory --owner=10001 --group=10001 --mode=0750 /data \
    && mkdir /models \
    && ln -s /opt/project/hscr/models/phantom/weights /models/phantom"
ENV PATH=/opt/project/bin:/opt/hscr/bin:$PATH \
    PYTHONPATH=/opt/project \
    HOME=/tmp \
    HSCR_HOME=/data \
    HSCR_MODEL_PATH=/models/phantom \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
VOLUME /data
WORKDIR /
USER 10001:10001
ARG BASE
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="HSCR"

# ---- gateway: also agent, relay, beat, migrations and the workers that need no torch ---------------------
FROM runtime AS gateway
COPY --from=gateway-packages /layers/hscr/ /
COPY --from=gateway-packages /layers/project/ /
LABEL org.opencontainers.image.title="hscr-gateway" \
      org.opencontainers.image.description="Gateway of HSCR, without torch; also its agent, relay, beat and migrations. Research use only."
ENV HSCR_HOST=0.0.0.0 \
    HSCR_PORT=8080
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 \
    CMD ["python", "-m", "hscr.healthcheck", "http://127.0.0.1:8080/readyz"]
CMD ["python", "-m", "service"]

# ---- worker: everything that computes with torch ---------------------------------------------------------
FROM runtime AS worker
COPY --from=worker-packages /layers/hscr/ /
COPY --from=worker-packages /layers/project/ /
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HSCR_HEALTH_FILE=/tmp/alive
LABEL org.opencontainers.image.title="hscr-worker" \
      org.opencontainers.image.description="Workers of HSCR that generate, score and fine-tune with torch. Research use only."
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 \
    CMD ["python", "-m", "hscr.healthcheck", "/tmp/alive"]
CMD ["celery", "-A", "workers.app", "--no-color", "worker", "--loglevel=INFO", "--pool=threads", "--concurrency=1", "--without-gossip", "--without-mingle", "-Q", "generate,score,finetune", "-n", "gpu@%h"]

# ---- engine: the embedded one; production runs vLLM's own image ------------------------------------------
FROM worker AS engine
LABEL org.opencontainers.image.title="hscr-engine" \
      org.opencontainers.image.description="Embedded inference engine of HSCR for one small model. Research use only."
EXPOSE 8100
HEALTHCHECK --interval=5s --timeout=4s --start-period=120s --retries=3 \
    CMD ["python", "-m", "hscr.healthcheck", "http://127.0.0.1:8100/health"]
CMD ["python", "-m", "service.embedded", "--model", "/models/phantom", "--served-model-name", "phantom", "--host", "0.0.0.0", "--port", "8100"]
