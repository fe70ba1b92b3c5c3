# surgeon on the CPU. Models are read from and written to mounted folders:
#
#   docker build -t surgeon .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" surgeon merge long short --method ties -o merged
#
# --build-arg EXTRAS= leaves torch and transformers out: merging, inspecting and verifying need neither.
FROM python:3.11-slim AS build
ARG EXTRAS=[run]
ARG TORCH_INDEX=
COPY pyproject.toml README.md LICENSE /src/
COPY surgeon /src/surgeon
COPY recipes /src/recipes
RUN python -m venv /opt/surgeon \
    && /opt/surgeon/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "/src${EXTRAS}"

FROM python:3.11-slim
COPY --from=build /opt/surgeon /opt/surgeon
# Caches go where every user may write; a volume on /cache keeps them between runs.
RUN useradd --create-home --uid 1000 surgeon && mkdir -m 1777 /cache && mkdir /work && chown surgeon /work
ENV PATH=/opt/surgeon/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache NUMBA_CACHE_DIR=/cache/numba PYTHONUNBUFFERED=1
USER surgeon
WORKDIR /work
VOLUME /work
ENTRYPOINT ["surgeon"]
CMD ["--help"]
