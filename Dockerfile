# The image holds one static binary and the CA certificates. BuildKit builds it for linux/amd64, linux/arm64 and
# linux/arm/v7 on a machine of any of these platforms (docs/INSTALL.md).

FROM --platform=$BUILDPLATFORM docker.io/library/rust:1.95.0-slim-bookworm AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src

# clang cross-compiles C code, given the headers of the target's musl; rustc includes a linker and musl itself.
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

# Builds the dependencies alone: this layer is cached until they change.
COPY Cargo.toml Cargo.lock ./
COPY crates/api/Cargo.toml crates/api/
COPY crates/autoscaler/Cargo.toml crates/autoscaler/
COPY crates/base/Cargo.toml crates/base/
COPY crates/http/Cargo.toml crates/http/
COPY crates/provider/Cargo.toml crates/provider/
COPY crates/proxy/Cargo.toml crates/proxy/
COPY crates/queue/Cargo.toml crates/queue/
COPY crates/worker/Cargo.toml crates/worker/
RUN mkdir -p src benches tests/it; \
    echo 'fn main() {}' | tee src/main.rs benches/call.rs > tests/it/main.rs; \
    for crate in . crates/*; do mkdir -p "$crate/src"; touch "$crate/src/lib.rs"; done; \
    cargo build --release --locked; \
    rm -r src crates

# The commit that /system/info reports; the build context has no git repository.
ARG REVISION=unknown
ENV GATEWAY_COMMIT=$REVISION
COPY build.rs ./
COPY src src
COPY crates crates
RUN find src crates build.rs -name '*.rs' -exec touch {} +; \
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
# Any other user works as well, and so does a read-only root file system.
USER 65532:65532
# Client requests; metrics of a gateway; metrics of a worker.
EXPOSE 8080 8082 8083
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=5s CMD ["/gateway", "healthcheck", "http://127.0.0.1:8082/_/healthz"]
ENTRYPOINT ["/gateway"]
CMD ["serve"]
