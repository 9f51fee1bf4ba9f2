# docker build -t companion .        (TORCH=auto for the build of your driver; CPU by default)
# docker run --rm -v "$PWD/labs:/labs" companion init /labs/heads
# docker run --rm -v "$PWD/labs:/labs" -w /labs/heads companion grid workflow/grids/lmi_directions.yaml
# The versions are those of constraints.txt, the lock that `make setup` and the Apptainer recipe use too.
FROM python:3.11-slim-bookworm
ARG TORCH=cpu
ARG EXTRAS=notebooks,batch,tables,mri-extra,formats
RUN apt-get update && apt-get install -y --no-install-recommends git libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/companion
COPY pyproject.toml setup.py MANIFEST.in constraints.txt README.md LICENSE CITATION.cff CHANGELOG.md ./
COPY src src
COPY notebooks notebooks
COPY workflow workflow
COPY checkpoints checkpoints
RUN pip install --no-cache-dir uv \
 && uv pip install --system --no-cache --torch-backend=${TORCH} -c constraints.txt ".[${EXTRAS}]"
# Containers are often run as a user without a home; companion then finds itself a place (see companion doctor).
WORKDIR /labs
ENTRYPOINT ["companion"]
CMD ["doctor"]
