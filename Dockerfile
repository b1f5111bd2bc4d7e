# One file, a target per service: router (no torch), prefill, decode. Plain Dockerfile syntax, so any builder will do.
# BASE is any image with Python 3.11 or newer; a GPU build passes its own BASE, PIP_ARGS or CONSTRAINTS.
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG CONSTRAINTS=constraints/cpu.txt
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/isthmus/bin:$PATH
RUN python3 -m venv /opt/isthmus
WORKDIR /src
COPY pyproject.toml LICENSE ./
COPY constraints constraints
COPY tools/list_requirements.py tools/
# Requirements first: a change of the sources does not install torch again.
# hadolint ignore=SC2086
RUN python tools/list_requirements.py > /tmp/requirements.txt \
    && pip install ${PIP_ARGS} -c "${CONSTRAINTS}" -r /tmp/requirements.txt

FROM build AS build-router
COPY . .
RUN pip install --no-deps .

FROM build AS build-engine
ARG CONSTRAINTS=constraints/cpu.txt
ARG PIP_ARGS=""
# hadolint ignore=SC2086
RUN python tools/list_requirements.py engine > /tmp/requirements.txt \
    && pip install ${PIP_ARGS} -c "${CONSTRAINTS}" -r /tmp/requirements.txt
COPY . .
RUN pip install --no-deps .

# hadolint ignore=DL3006
FROM ${BASE} AS runtime
# Triton needs a C compiler on a GPU; CPU images do without.
ARG SYSTEM_PACKAGES=""
# hadolint ignore=DL3008,SC2086
RUN if [ -n "${SYSTEM_PACKAGES}" ]; then \
        apt-get update && apt-get install -y --no-install-recommends ${SYSTEM_PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --system --uid 10001 --home-dir /srv/isthmus --create-home isthmus
ENV PATH=/opt/isthmus/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 \
    ISTHMUS_HOST=0.0.0.0 ISTHMUS_GRPC_PORT=50051 ISTHMUS_HTTP_PORT=8080
USER 10001
WORKDIR /srv/isthmus
EXPOSE 50051 8080
# Ready: model loaded, numerics canary passed, registered, one real round trip through the transfer path.
HEALTHCHECK --interval=3s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"]

FROM runtime AS router
COPY --from=build-router /opt/isthmus /opt/isthmus
CMD ["python", "-m", "router"]

FROM runtime AS prefill
COPY --from=build-engine /opt/isthmus /opt/isthmus
CMD ["python", "-m", "prefill_service"]

FROM runtime AS decode
COPY --from=build-engine /opt/isthmus /opt/isthmus
ENV ISTHMUS_ZMQ_PORT=5555
EXPOSE 5555
CMD ["python", "-m", "decode_service"]
