# CPU image: docker build -t lit-tokenformer . && docker run lit-tokenformer fit --config vit_small
# GPU image: docker build --build-arg BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime --build-arg TORCH_INDEX= -t lit-tokenformer .
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/lit-tokenformer
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY callbacks callbacks
COPY configs configs
COPY lit_tokenformer lit_tokenformer
RUN if [ -n "$TORCH_INDEX" ]; then pip install torch torchvision --index-url "$TORCH_INDEX"; fi && pip install '.[hf]'
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["lit-tokenformer"]
CMD ["--help"]
