//! The table of all settings: name, default, description. `--help`, the parser and docs/SETTINGS.md are made from it.
//! The name of a setting is its environment variable. Its flag is the same name with dashes.

/// A role of the program: the subcommand that reads a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `gateway serve`
    Serve,
    /// `gateway worker`
    Worker,
    /// `gateway provider process`
    Provider,
    /// `gateway up`
    Up,
}

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Name of the environment variable. Where OpenFaaS has the setting, the name is the same.
    pub name: &'static str,
    /// Kind of value, such as `DURATION`, for `--help`.
    pub value_kind: &'static str,
    /// Value that applies when the setting is not set; empty for none.
    pub default: &'static str,
    /// Description. `-h` shows its first sentence.
    pub help: &'static str,
    /// Roles that read the setting.
    pub roles: &'static [Role],
    /// Heading in `--help` and docs/SETTINGS.md.
    pub group: &'static str,
}

const SERVE: &[Role] = &[Role::Serve];
const WORKER: &[Role] = &[Role::Worker];
const SERVE_WORKER: &[Role] = &[Role::Serve, Role::Worker];
const PROVIDER: &[Role] = &[Role::Provider];
const PROVIDER_UP: &[Role] = &[Role::Provider, Role::Up];
const SERVE_UP: &[Role] = &[Role::Serve, Role::Up];
const SERVE_UP_WORKER: &[Role] = &[Role::Serve, Role::Up, Role::Worker];
const SERVE_PROVIDER_UP: &[Role] = &[Role::Serve, Role::Provider, Role::Up];
const ALL_ROLES: &[Role] = &[Role::Serve, Role::Worker, Role::Provider, Role::Up];

macro_rules! settings {
    ($(# $group:literal $($name:ident $value:ident $default:literal $roles:ident $help:literal)*)*) => {
        /// All settings, in the order of `--help`.
        pub const SETTINGS: &[Setting] = &[$($(Setting {
            name: stringify!($name), value_kind: stringify!($value), default: $default, help: $help, roles: $roles,
            group: $group,
        }),*),*];
    };
}

settings! {
    # "Provider and addresses"
    functions_provider_url URL "" SERVE_WORKER
        "URL of the provider that runs the functions. serve requires it; a worker without it calls functions through the gateway at faas_gateway_address."
    logs_provider_url URL "" SERVE
        "URL that /system/logs is forwarded to. Default: the provider."
    function_namespace NAME "" SERVE_UP_WORKER
        "Namespace of functions that are called without one."
    listen_address ADDRESS "0.0.0.0" SERVE_WORKER
        "IP address to listen on, for clients and for the metrics port. `up` always listens on 127.0.0.1."
    port PORT "8080" SERVE_UP
        "Port for clients: functions, queued calls, the API and the page under /ui/."
    metrics_port PORT "8082" SERVE_UP
        "Port for GET /metrics and GET /healthz. Do not expose it."
    worker_metrics_port PORT "8083" WORKER
        "Port for GET /metrics, /healthz and /_/ready of a worker. Do not expose it."
    metrics_hosts LIST "" SERVE_UP_WORKER
        "Additional host names under which the metrics port answers, separated by commas; *.DOMAIN matches all names below DOMAIN, * matches any. IP addresses, names without a dot and names of the local network (such as those that end in .svc, .local, .internal or a search domain of /etc/resolv.conf) are always accepted."
    threads COUNT "0" SERVE_UP
        "Threads that proxy calls, each with its own listener and connections; 0 means one per core."
    # "Timeouts"
    read_timeout DURATION "60s" SERVE_UP
        "Maximum time for receiving a request, head and body."
    write_timeout DURATION "60s" SERVE_UP
        "Maximum time during which a client accepts none of its response. Then the connection is closed."
    upstream_timeout DURATION "60s" SERVE_UP_WORKER
        "Maximum time from the first byte sent to a function until the last byte of its response. For streams (server-sent events, NDJSON, gRPC, upgrades) it limits the time to the first byte, and then each pause."
    connect_timeout DURATION "2s" SERVE_UP_WORKER
        "Maximum time for connecting to one address of a provider or function. Then the next address is tried, or the same one again for up to 10s if there is no other; upstream_timeout applies as well."
    idle_timeout DURATION "2m" SERVE_UP
        "Maximum time for which a client connection may stay open without a request."
    # "Limits"
    max_idle_conns COUNT "1024" SERVE_UP_WORKER
        "Maximum number of idle connections to all providers and functions."
    max_idle_conns_per_host COUNT "1024" SERVE_UP_WORKER
        "Maximum number of idle connections to one host."
    max_calls COUNT "10000" SERVE_UP
        "Maximum number of calls in flight. Beyond it, new calls get 503, and so does /_/ready."
    max_connections COUNT "20000" SERVE_UP
        "Maximum number of client connections. Beyond it, each new connection closes the one that has been idle longest, and waits if none is idle. The limit on open files, which is raised at the start, applies as well."
    max_head_memory BYTES "67108864" SERVE_UP
        "Maximum memory for incomplete request heads, not counting heads of up to 8 KiB. Beyond it, the largest heads get 503."
    tcp_congestion_control NAME "" SERVE_UP
        "TCP congestion control for client connections, such as reno. It must be listed in net.ipv4.tcp_allowed_congestion_control, or the start fails. Empty: the system's default; where that is bbr, clients on this machine get reno, which takes a quarter less CPU for large responses. With tcp_congestion_control=bbr, all clients get bbr."
    # "Shutdown"
    shutdown_delay DURATION "0s" SERVE_UP
        "Time after SIGTERM during which new connections are still accepted, while /_/ready already returns 503."
    shutdown_grace DURATION "30s" ALL_ROLES
        "Time after shutdown_delay in which calls in flight may finish."
    # "Credentials"
    basic_auth BOOLEAN "false" ALL_ROLES
        "Require the credentials in the files basic-auth-user and basic-auth-password for /system/* and /ui/, and send them to the provider."
    secret_mount_path DIRECTORY "/run/secrets/" ALL_ROLES
        "Directory of the credential files. They are read again when they change."
    auth_proxy_url URL "" SERVE_UP
        "URL of a service that authorizes requests of /system/* and /ui/, instead of basic_auth. A 2xx response permits the request, any other is returned to the client. The service gets the client's headers, and method, path with query, and host in X-Forwarded-Method, X-Forwarded-Uri and X-Forwarded-Host."
    auth_proxy_pass_body BOOLEAN "false" SERVE_UP
        "Send the body of the request (at most 1 MiB) to auth_proxy_url as well."
    # "Direct calls"
    direct_functions BOOLEAN "false" SERVE
        "Call functions at http://NAME.SUFFIX:8080 instead of through the provider."
    direct_functions_suffix NAME "" SERVE
        "SUFFIX of direct_functions, such as openfaas-fn.svc.cluster.local."
    # "Scaling"
    scale_from_zero BOOLEAN "false" SERVE_WORKER
        "Scale a function up when it is called at zero replicas, and hold its calls until it is ready. `up` always does this."
    cold_start_timeout DURATION "60s" SERVE_UP_WORKER
        "Maximum time that a call waits for its function to become ready. Then it gets 503."
    cold_start_queue_limit COUNT "1000" SERVE_UP_WORKER
        "Maximum number of calls that wait for one function. Beyond it, calls get 503."
    autoscale CHOICE "auto" SERVE_UP
        "Scale functions by their load, as their labels com.openfaas.scale.* say: true, false, or auto (true for up, else false). Several gateways need faas_nats_address to share what they measure."
    autoscale_window DURATION "60s" SERVE_UP
        "Time over which load is averaged, from 2s to 1h. A tenth of it, at least 2s, is used to detect that load has doubled."
    # "Other services"
    faas_prometheus_host HOST "prometheus" SERVE
        "Host of Prometheus, which supplies invocationCount in GET /system/functions. While it is unavailable, the list has no counts."
    faas_prometheus_port PORT "9090" SERVE
        "Port of Prometheus."
    faas_gateway_address HOST "gateway" WORKER
        "Gateway through which a worker calls functions if functions_provider_url is not set."
    faas_gateway_port PORT "8080" WORKER
        "Port of that gateway."
    # "Process provider"
    provider_address ADDRESS "127.0.0.1" PROVIDER
        "IP address on which the provider listens. A client of the provider can run commands here, so any address but loopback requires basic_auth=true."
    provider_port PORT "8081" PROVIDER_UP
        "Port of the provider."
    # "Queued calls"
    queue CHOICE "auto" SERVE_UP_WORKER
        "Queue backend: embedded (a file in state_dir; not for gateway worker), jetstream or stan (NATS JetStream or NATS Streaming at faas_nats_address), or none. auto: embedded for up; otherwise the one that answers at faas_nats_address if that is set, or none."
    with_worker CHOICE "auto" SERVE_UP
        "Execute queued calls in this process: true, false, or auto (true if there is a queue)."
    # "NATS"
    faas_nats_address LIST "" SERVE_WORKER
        "Servers of NATS JetStream or NATS Streaming, separated by commas."
    faas_nats_port PORT "4222" SERVE_WORKER
        "Port of NATS servers that are listed without one."
    faas_nats_channel NAME "faas-request" SERVE_WORKER
        "Name of the queue. Gateways and workers with the same name share it."
    faas_nats_cluster_name NAME "faas-cluster" SERVE_WORKER
        "Cluster id of NATS Streaming."
    faas_nats_queue_group NAME "faas" SERVE_WORKER
        "Queue group of the workers that share the calls on NATS Streaming."
    faas_max_reconnect COUNT "" SERVE_WORKER
        "Accepted for compatibility, and ignored: connecting to NATS is retried without limit."
    faas_reconnect_delay DURATION "2s" SERVE_WORKER
        "Maximum pause between attempts to connect to NATS Streaming."
    nats_user NAME "" SERVE_WORKER
        "User for NATS, with nats_password."
    nats_password TEXT "" SERVE_WORKER
        "Password for NATS."
    nats_token TEXT "" SERVE_WORKER
        "Token for NATS, instead of user and password."
    nats_nkey_seed FILE "" SERVE_WORKER
        "File with the seed of an nkey for NATS."
    nats_creds FILE "" SERVE_WORKER
        "Credentials file for NATS, as written by nsc."
    nats_tls BOOLEAN "false" SERVE_WORKER
        "Connect to NATS over TLS only."
    nats_ca FILE "" SERVE_WORKER
        "File with the certificates that verify the NATS server. Default: those of the system."
    nats_replicas COUNT "1" SERVE_WORKER
        "Number of servers of a NATS cluster that store each call."
    nats_storage CHOICE "file" SERVE_WORKER
        "Where NATS JetStream stores calls: file, or memory, which loses them when the servers stop."
    # "Queued calls"
    ack_wait DURATION "30s" SERVE_WORKER
        "Time without a sign of life from its worker after which a queued call is delivered to another worker. A call may take longer than that."
    max_inflight COUNT "50" SERVE_UP_WORKER
        "Queued calls executed concurrently. Up to twice as many more may be waiting for their acknowledgement."
    faas_print_body BOOLEAN "false" WORKER
        "Log up to 1 KiB of the body of each queued call. Bodies may contain secrets."
    write_debug BOOLEAN "false" WORKER
        "Log each executed call with its outcome at level info instead of debug."
    max_async_body_bytes BYTES "16777216" SERVE_UP
        "Maximum body of a queued call."
    max_pending_calls COUNT "1000000" SERVE_UP_WORKER
        "Maximum number of calls that wait in the queue. Beyond it, new calls get 503. Several gateways on NATS may exceed it slightly, since each counts the calls of the others only from time to time."
    result_ttl DURATION "1h" SERVE_UP_WORKER
        "Time for which the state and result of a finished call, and the Idempotency-Key of a call, are kept."
    max_result_body_bytes BYTES "1048576" SERVE_UP_WORKER
        "Maximum body of a stored result. A longer one is cut off, and the result has X-Truncated."
    callback_allowlist LIST "auto" SERVE_UP_WORKER
        "Destinations that callbacks may connect to in addition to public and private addresses, separated by commas: networks, addresses, names, loopback or *. auto: loopback for up, none for serve and worker. Callbacks are signed if secret_mount_path has a file callback-secret, and while the secret is being changed also by callback-secret-previous."
    # "Files"
    state_dir DIRECTORY ".gateway" SERVE_PROVIDER_UP
        "Directory for functions, secrets, namespaces and the embedded queue. For up, a relative path is relative to the directory of the stack file."
    # "Logs and traces"
    access_log CHOICE "off" SERVE_UP
        "Log a line for each request: off, on, or errors (status 500 and above, or a response that was cut short). The lines have the target access; log_level=access=off,… silences them."
    otlp_endpoint URL "" SERVE_UP_WORKER
        "Collector that traces are sent to, by OTLP over HTTP (JSON) at its path /v1/traces. The header traceparent names the trace of a request."
    otlp_headers LIST "" SERVE_UP_WORKER
        "Headers for the collector, such as Authorization=Bearer KEY, separated by commas."
    otlp_sampling_ratio RATIO "1" SERVE_UP_WORKER
        "Share of the traces started here that are sent, from 0 to 1. For traces of clients, the flag in their traceparent decides."
    log_level FILTER "info" ALL_ROLES
        "error, warn, info, debug, trace or off; also target=level, separated by commas."
    log_format CHOICE "text" ALL_ROLES
        "text or json."
}

/// Returns the setting called `name`. Panics if the table has no such setting, which a test excludes for each role.
pub fn find(name: &str) -> &'static Setting {
    SETTINGS.iter().find(|s| s.name == name).unwrap_or_else(|| unreachable!("no setting {name}"))
}
