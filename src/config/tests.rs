//! Tests of parsing settings.

use super::*;

fn serve(vars: &[(&str, &str)]) -> Result<Serve, Vec<String>> {
    let var = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
    Serve::parse(SettingsReader::new(&|_| None, &var))
        .map_err(|mistakes| mistakes.iter().map(ToString::to_string).collect())
}

#[test]
fn defaults_come_from_the_table() {
    let config = serve(&[("functions_provider_url", "http://p:8081/")]).unwrap();
    assert_eq!(config.listen.address.to_string(), "0.0.0.0:8080");
    assert_eq!(config.metrics.address.to_string(), "0.0.0.0:8082");
    assert_eq!(config.timeouts.upstream, Duration::from_secs(60));
    assert_eq!(config.provider.to_string(), "http://p:8081");
    assert_eq!(config.logs_provider, config.provider);
    assert_eq!(config.limits.calls, 10_000);
    assert_eq!(config.prometheus.unwrap().to_string(), "http://prometheus:9090");
    assert!(config.auth.credentials_dir.is_none() && config.direct_functions.is_none());
}

#[test]
fn all_errors_are_reported_together() {
    let mistakes = serve(&[
        ("read_timeout", "ten"),
        ("port", "70000"),
        ("basic_auth", "maybe"),
        ("upstream_timeout", "0"),
    ])
    .unwrap_err();
    assert_eq!(mistakes.len(), 5, "{mistakes:#?}");
    assert!(mistakes[0].starts_with("functions_provider_url is not set"));
    assert!(mistakes.iter().any(|m| m.starts_with("read_timeout: \"ten\" is not a duration")));
    assert!(mistakes.iter().any(|m| m.starts_with("basic_auth: \"maybe\" is not true or false")));
}

#[test]
fn a_flag_has_precedence_over_a_variable_and_an_empty_value_is_unset() {
    let flag = |name: &str| (name == "port").then(|| "1".to_owned());
    let var = |name: &str| match name {
        "port" => Some("2".to_owned()),
        "metrics_port" => Some(String::new()),
        "functions_provider_url" => Some("http://p".to_owned()),
        _ => None,
    };
    let config = Serve::parse(SettingsReader::new(&flag, &var)).unwrap();
    assert_eq!((config.listen.address.port(), config.metrics.address.port()), (1, 8082));
}

#[test]
fn calls_are_stored_on_disk_unless_memory_is_set() {
    let in_memory = |storage: &str| {
        serve(&[("functions_provider_url", "http://p"), ("nats_storage", storage)])
            .map(|config| config.queue.nats.in_memory)
    };
    assert_eq!((in_memory(""), in_memory("memory")), (Ok(false), Ok(true)));
    assert!(in_memory("tape").unwrap_err()[0].contains("file or memory"));
}

#[test]
fn the_backend_is_discovered_on_nats_or_named() {
    let backend = |vars: &[(&str, &str)]| {
        serve(&[vars, &[("functions_provider_url", "http://p")]].concat())
            .map(|config| config.queue.backend)
    };
    let address = ("faas_nats_address", "nats");
    assert_eq!(backend(&[]), Ok(Backend::None));
    assert_eq!(backend(&[address]), Ok(Backend::Nats));
    assert_eq!(backend(&[address, ("queue", "stan")]), Ok(Backend::Stan));
    assert_eq!(backend(&[address, ("queue", "jetstream")]), Ok(Backend::JetStream));
    assert!(backend(&[("queue", "stan")]).unwrap_err()[0].starts_with("faas_nats_address"));
    let limited = backend(&[address, ("faas_max_reconnect", "120")]);
    assert_eq!(limited, Ok(Backend::Nats));
    assert!(backend(&[address, ("faas_max_reconnect", "often")]).is_err());
}

#[test]
fn a_provider_on_another_address_than_loopback_requires_credentials() {
    let var = |name: &str| (name == "provider_address").then(|| "0.0.0.0".to_owned());
    let mistakes = Provider::parse(SettingsReader::new(&|_| None, &var)).unwrap_err();
    assert!(mistakes[0].to_string().contains("loopback"), "{}", mistakes[0]);
}
