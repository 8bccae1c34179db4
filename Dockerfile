# SecureReID in a container: CPU by default, CUDA with --build-arg TORCH_INDEX=.
#
#   docker build -t securereid .
#   mkdir -p output keys
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/output:/output" securereid \
#     demo --output /output/demo
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/keys:/keys" securereid \
#     keyring --keyring /keys/keys.db --master /keys/master.key init
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/photos:/data:ro" -v "$PWD/output:/output" \
#     -v "$PWD/keys:/keys" securereid protect protect /data /output/sealed \
#     --checkpoint /output/demo/full --keyring /keys/keys.db --master /keys/master.key
#
# Folders of -v that do not exist are created by Docker for root, hence mkdir. --user writes files
# that belong to you. In a checkout, use the folders output, keys and photos, or others outside it:
# .dockerignore keeps these out of the image.
#
# For CUDA (the host needs the NVIDIA container toolkit; add --gpus all to docker run):
#   docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t securereid:cuda .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/securereid
COPY . .
# torch and torchvision first, from the index that decides between CPU and CUDA builds.
RUN grep -E '^(torch|torchvision)>=' requirements.txt > /tmp/torch.txt && \
    pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple -r /tmp/torch.txt && \
    pip install -e '.[cuhk03,onnx]' && \
    rm /tmp/torch.txt

# Keys and results belong to the user who runs the container, not to root.
RUN useradd --create-home --uid 1000 securereid && \
    mkdir -p /data /keys /output && \
    chown securereid /data /keys /output && \
    chmod 700 /keys
# A user given by --user has no account: torch needs a name, and caches need a folder.
ENV HOME=/tmp USER=securereid
USER securereid
WORKDIR /output
VOLUME ["/data", "/keys", "/output"]

ENTRYPOINT ["securereid"]
CMD ["--help"]
