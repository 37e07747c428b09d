# The gateway as an image of one static program and the certificates it trusts. Made by BuildKit, for
# linux/amd64, linux/arm64 and linux/arm/v7, on a machine of any of them (docs/INSTALL.md).

FROM --platform=$BUILDPLATFORM docker.io/library/rust:1.95.0-slim-bookworm AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src

# clang makes objects for every kind of machine, given the headers of its C library, musl; rustc brings a linker
# and the library itself.
ARG TARGETPLATFORM
COPY docker/target.sh /
# hadolint ignore=DL3008,SC2154
RUN source /target.sh; \
    dpkg --add-architecture "$debian"; \
    apt-get update; \
    apt-get install -y --no-install-recommends ca-certificates clang llvm "musl-dev:$debian"; \
    rm -rf /var/lib/apt/lists/*; \
    rustup target add "$triple"; \
    cargo_config > "$CARGO_HOME/config.toml"

# The dependencies alone: a layer that stays until they change.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src benches tests/it; \
    echo 'fn main() {}' | tee src/main.rs benches/call.rs > tests/it/main.rs; \
    touch src/lib.rs; \
    cargo build --release --locked; \
    rm -r src

# The commit, which /system/info tells: no repository comes along to ask.
ARG REVISION=unknown
ENV GATEWAY_COMMIT=$REVISION
COPY build.rs ./
COPY src src
RUN find src build.rs -name '*.rs' -exec touch {} +; \
    cargo build --release --locked; \
    cp target/*/release/gateway /gateway

FROM scratch
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="gateway" \
      org.opencontainers.image.description="An API gateway for functions" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /gateway /
# Any other user will do, and a root file system that is read-only.
USER 65532:65532
# Callers; numbers of a gateway; numbers of a worker.
EXPOSE 8080 8082 8083
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=5s CMD ["/gateway", "healthcheck", "http://127.0.0.1:8082/_/healthz"]
ENTRYPOINT ["/gateway"]
CMD ["serve"]
