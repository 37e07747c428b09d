//! Every setting there is: name, default, meaning. `--help`, the parser and the README's table all come from here.
//! A setting's name is its environment variable; its flag is the same with dashes.

/// The roles a setting belongs to.
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
    /// The variable's name, as operators of OpenFaaS know it where they do.
    pub name: &'static str,
    /// The kind of value, for `--help`.
    pub value: &'static str,
    /// What holds when it is not set; empty for none.
    pub default: &'static str,
    /// What it does, in one or two sentences.
    pub about: &'static str,
    /// Who reads it.
    pub roles: &'static [Role],
    /// The heading in `--help` under which it stands.
    pub group: &'static str,
}

const S: &[Role] = &[Role::Serve];
const W: &[Role] = &[Role::Worker];
const SW: &[Role] = &[Role::Serve, Role::Worker];
const P: &[Role] = &[Role::Provider];
const PU: &[Role] = &[Role::Provider, Role::Up];
const SU: &[Role] = &[Role::Serve, Role::Up];
const SUW: &[Role] = &[Role::Serve, Role::Up, Role::Worker];
const SPU: &[Role] = &[Role::Serve, Role::Provider, Role::Up];
const ALL: &[Role] = &[Role::Serve, Role::Worker, Role::Provider, Role::Up];

macro_rules! settings {
    ($(# $group:literal $($name:ident $value:ident $default:literal $roles:ident $about:literal)*)*) => {
        /// All settings, in the order in which `--help` shows them.
        pub const SETTINGS: &[Setting] = &[$($(Setting {
            name: stringify!($name), value: stringify!($value), default: $default, about: $about, roles: $roles,
            group: $group,
        }),*),*];
    };
}

settings! {
    # "Provider and addresses"
    functions_provider_url URL "" SW
        "The provider that runs the functions. Required for serve; a worker without it calls through the gateway at faas_gateway_address."
    logs_provider_url URL "" S
        "Where /system/logs is asked for. Default: the provider."
    function_namespace NAME "" SUW
        "Namespace of a function that is called without one."
    listen_address ADDRESS "0.0.0.0" SW
        "Address that callers and the metrics port are served on (`up` always takes 127.0.0.1)."
    port PORT "8080" SU
        "Port for everything callers use."
    metrics_port PORT "8082" SU
        "Port for GET /metrics and GET /healthz; not to be exposed."
    worker_metrics_port PORT "8083" W
        "Port for GET /metrics, /healthz and /_/ready of a worker; not to be exposed."
    metrics_hosts LIST "" SUW
        "Names by which the metrics port may be asked, beside IP addresses, names without a dot and names of the own network (such as those ending in .svc, .local, .internal or a search domain of /etc/resolv.conf), separated by commas; *.DOMAIN for all names below it, * for any."
    threads COUNT "0" SU
        "Threads that carry calls, each with its own listener and connections; 0: one for each core."
    # "Time-outs"
    read_timeout DURATION "60s" SU
        "The most time a caller may take to send its request, head and body."
    write_timeout DURATION "60s" SU
        "The longest time a caller may take nothing of its answer before it is cut off."
    upstream_timeout DURATION "60s" SUW
        "From the first byte sent to a function until its last byte back; for streams (server-sent events, NDJSON, gRPC, upgrades) until the first byte, and then between two."
    connect_timeout DURATION "2s" SUW
        "How long one address of a provider or function may take to accept a connection before the next one is tried, or the same again for 10s in all where there is no other; upstream_timeout bounds it, too."
    idle_timeout DURATION "2m" SU
        "How long a caller's connection may stay open without a call."
    # "Limits"
    max_idle_conns COUNT "1024" SUW
        "Idle connections to providers and functions kept open in all."
    max_idle_conns_per_host COUNT "1024" SUW
        "Idle connections kept open to one host."
    max_calls COUNT "10000" SU
        "Calls in flight; beyond it new ones are answered 503 and /_/ready turns 503."
    max_connections COUNT "20000" SU
        "Connections of callers; beyond it the one that has been idle longest is closed for each further one, which waits while none is idle. Bounded by the limit on open files."
    max_head_memory BYTES "67108864" SU
        "What incomplete request heads may have together, those of up to 8 KiB not counted; beyond it the largest are answered 503."
    tcp_congestion_control NAME "" SU
        "How sending to callers is paced, such as reno: one that net.ipv4.tcp_allowed_congestion_control lists, any other stops the start; empty: as the system says at the start, but where that is bbr, callers over loopback or from an address of this machine are sent to by reno, which takes a quarter less CPU for a large answer. With tcp_congestion_control=bbr they are paced as all others."
    # "Stop"
    shutdown_delay DURATION "0s" SU
        "After SIGTERM, how long new connections are still taken, while /_/ready already says 503."
    shutdown_grace DURATION "30s" ALL
        "After shutdown_delay, how long calls in flight may take to finish."
    # "Credentials"
    basic_auth BOOLEAN "false" ALL
        "Ask for the credentials in the files basic-auth-user and basic-auth-password on /system/* and /ui/, and give them to the provider."
    secret_mount_path DIRECTORY "/run/secrets/" ALL
        "Where the files of basic_auth are; they are read again when they change."
    auth_proxy_url URL "" SU
        "Ask this URL about calls of /system/* and /ui/ instead: 2xx lets them pass, any other status is the answer. It is sent the client's headers, and method, path with query, and host as X-Forwarded-Method, -Uri and -Host."
    auth_proxy_pass_body BOOLEAN "false" SU
        "Send the call's body (at most 1 MiB) to auth_proxy_url, too."
    # "Direct calls"
    direct_functions BOOLEAN "false" S
        "Call functions at http://NAME.SUFFIX:8080 instead of through the provider."
    direct_functions_suffix NAME "" S
        "The SUFFIX of direct_functions, such as openfaas-fn.svc.cluster.local."
    # "Scaling"
    scale_from_zero BOOLEAN "false" SW
        "Wake a function at zero replicas when it is called, and have its callers wait (`up` always does)."
    cold_start_timeout DURATION "60s" SUW
        "How long a call waits for its function to become ready; then it is answered 503."
    cold_start_queue_limit COUNT "1000" SUW
        "Calls that wait for one function; beyond it further ones are answered 503."
    autoscale CHOICE "auto" SU
        "Scale functions by their load, if their labels com.openfaas.scale.* say how: true, false, or auto (for up alone). Several gateways need faas_nats_address to see each other's calls."
    autoscale_window DURATION "60s" SU
        "What load is averaged over before replicas are taken away; a tenth of it for load that has doubled. From 2s to 1h."
    # "Other services"
    faas_prometheus_host HOST "prometheus" S
        "Prometheus, asked for invocationCount in GET /system/functions; while it is away the list comes without."
    faas_prometheus_port PORT "9090" S
        "Prometheus's port."
    faas_gateway_address HOST "gateway" W
        "The gateway that a worker calls functions through when functions_provider_url is not set."
    faas_gateway_port PORT "8080" W
        "Port of that gateway."
    # "Process provider"
    provider_address ADDRESS "127.0.0.1" P
        "Address of the provider. Whoever reaches it can run commands here, so another than loopback also needs basic_auth=true."
    provider_port PORT "8081" PU
        "Port of the provider."
    # "Queued calls"
    queue KIND "auto" SUW
        "Where queued calls are kept: embedded (a file in state_dir; not for gateway worker), jetstream or stan (NATS JetStream or NATS Streaming at faas_nats_address), or none; auto: embedded for up; else whichever answers at faas_nats_address if that is set, or none."
    with_worker CHOICE "auto" SU
        "Make queued calls in this process: true, false, or auto (if there is a queue)."
    # "NATS"
    faas_nats_address HOSTS "" SW
        "NATS servers with JetStream or NATS Streaming, separated by commas."
    faas_nats_port PORT "4222" SW
        "Port of those that are named without one."
    faas_nats_channel NAME "faas-request" SW
        "Name of the queue; gateways and workers with the same one share it."
    faas_nats_cluster_name NAME "faas-cluster" SW
        "NATS Streaming's cluster id."
    faas_nats_queue_group NAME "faas" SW
        "Group of the workers that share the calls on NATS Streaming."
    faas_max_reconnect COUNT "" SW
        "Accepted for compatibility; NATS is tried for ever."
    faas_reconnect_delay DURATION "2s" SW
        "The longest pause between attempts to reach NATS Streaming."
    nats_user NAME "" SW
        "User for NATS, with nats_password."
    nats_password TEXT "" SW
        "Password for NATS."
    nats_token TEXT "" SW
        "Token for NATS, instead of user and password."
    nats_nkey_seed FILE "" SW
        "File with the seed of an nkey for NATS."
    nats_creds FILE "" SW
        "Credentials file for NATS, as nsc writes it."
    nats_tls BOOLEAN "false" SW
        "Connect to NATS over TLS only."
    nats_ca FILE "" SW
        "Certificates that NATS's is checked against; default: the system's."
    nats_replicas COUNT "1" SW
        "How many servers of a NATS cluster keep each call."
    nats_storage CHOICE "file" SW
        "Where NATS JetStream keeps calls: file, or memory, which loses them when the servers go."
    # "Queued calls"
    ack_wait DURATION "30s" SW
        "A queued call whose worker has not been heard of for so long is made by another. Calls may take longer."
    max_inflight COUNT "50" SUW
        "Queued calls made at a time."
    faas_print_body BOOLEAN "false" W
        "Log the body of each queued call, or the first 1 KiB of it. Bodies may hold secrets."
    write_debug BOOLEAN "false" W
        "Log each queued call that was made, and what came of it, at level info instead of debug."
    max_async_body_bytes BYTES "16777216" SU
        "The largest body of a queued call."
    max_pending_calls COUNT "1000000" SUW
        "Queued calls that may wait; beyond it new ones are answered 503."
    result_ttl DURATION "1h" SUW
        "How long state and answer of a finished queued call can be asked for, and an Idempotency-Key stands for its call."
    max_result_body_bytes BYTES "1048576" SUW
        "So much of the answer to a queued call is kept; what is longer is marked truncated."
    callback_allowlist LIST "auto" SUW
        "Where callbacks may go beside public and private addresses: networks, addresses, names, loopback or *, separated by commas; auto: loopback for up, nothing for serve. They are signed if secret_mount_path has a file callback-secret, and during a change also with callback-secret-previous."
    # "Files"
    state_dir DIRECTORY ".gateway" SPU
        "Where functions, secrets, namespaces and the embedded queue are kept. For up, a relative path begins at the directory of the stack file."
    # "Logs and traces"
    access_log CHOICE "off" SU
        "A line in the log for each request: off, on, or errors (those answered with 500 or above, or cut short). Its lines have the target access; log_level=access=off,… silences them."
    otlp_endpoint URL "" SUW
        "Send traces to this collector, by OTLP over HTTP (JSON), at its path /v1/traces. The header traceparent says which trace a request belongs to."
    otlp_headers LIST "" SUW
        "Headers that the collector wants, such as Authorization=Bearer KEY, separated by commas."
    otlp_sampling_ratio PART "1" SUW
        "So great a part, from 0 to 1, of the traces that begin here is sent; those of callers go by their own flag."
    log_level FILTER "info" ALL
        "error, warn, info, debug or trace; also as target=level, separated by commas."
    log_format FORMAT "text" ALL
        "text or json."
}

/// The setting called `name`. Every name used in the code is in the table; a test sees to it.
pub fn find(name: &str) -> &'static Setting {
    SETTINGS.iter().find(|s| s.name == name).unwrap_or_else(|| unreachable!("no setting {name}"))
}
