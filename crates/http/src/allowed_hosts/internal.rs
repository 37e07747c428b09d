//! Host names under which the metrics port may be called. A web page can have its own public name resolve to this
//! machine (DNS rebinding); a browser then treats the responses of this port as the page's own. Scrapers use an IP
//! address, or a name of the network that they share with this machine.

use std::fs;
use std::net::IpAddr;

use http::HeaderMap;
use http::header::HOST;

use crate::allowed_hosts::{AllowedHosts, Rejection, check, without_port};

/// Domains that cannot be registered on the internet, so that no web page can have such a name: reserved (RFC 6761, 6762,
/// 8375, ICANN's `internal`), or used by Kubernetes.
const PRIVATE_DOMAINS: [&str; 8] =
    ["localhost", "local", "localdomain", "internal", "home.arpa", "lan", "svc", "test"];

/// The accepted host names.
#[derive(Debug)]
pub struct InternalHosts {
    /// Exact names: those of the setting, and this machine's own, in lower case.
    hosts: Vec<String>,
    /// Domain suffixes, without their leading dot, in lower case.
    domains: Vec<String>,
    allows_any: bool,
}

impl InternalHosts {
    /// Accepts the names of the setting `metrics_hosts`, and those in this machine's own configuration.
    pub fn new(configured: &[String]) -> Self {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        Self::from_parts(configured, &name, &resolver)
    }

    fn from_parts(configured: &[String], own_name: &str, resolver: &str) -> Self {
        let configured = configured.iter().map(String::as_str);
        let (domains, hosts): (Vec<&str>, Vec<&str>) =
            configured.clone().partition(|name| name.starts_with("*."));
        let domains = domains.iter().map(|domain| &domain[2..]);
        let domains = domains.chain(search_domains(resolver)).chain(PRIVATE_DOMAINS);
        Self {
            hosts: hosts.into_iter().chain([own_name]).map(str::to_ascii_lowercase).collect(),
            domains: domains.map(str::to_ascii_lowercase).collect(),
            allows_any: configured.clone().any(|name| name == "*"),
        }
    }

    /// Returns whether `host`, with or without a port, is accepted.
    fn allows(&self, host: &str) -> bool {
        let name = without_port(host);
        let literal = name.trim_start_matches('[').trim_end_matches(']');
        // A name without a dot is resolved in the client's search domains, not on the internet.
        if self.allows_any || literal.parse::<IpAddr>().is_ok() || !name.contains('.') {
            return true;
        }
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        self.hosts.contains(&name)
            || self.domains.iter().any(|domain| {
                name.strip_suffix(domain.as_str()).is_some_and(|before| before.ends_with('.'))
            })
    }

    /// Checks that no web page of another origin can have sent a request with these headers. `authority`: that of its
    /// target, if it has one.
    ///
    /// # Errors
    /// The reason of the rejection, for the client.
    pub fn check(&self, headers: &HeaderMap, authority: Option<&str>) -> Result<(), &'static str> {
        // A `Host` that is not ASCII text is not accepted.
        let host = authority.or_else(|| Some(headers.get(HOST)?.to_str().unwrap_or("?.?")));
        match host {
            Some(host) if !self.allows(host) => Err(
                "this host name is not allowed on the metrics port: use an IP address, or add the name to metrics_hosts",
            ),
            _ => check(headers, AllowedHosts::Any).map_err(Rejection::reason),
        }
    }
}

/// Returns the search domains of this machine. Domains of one label are left out: they would be a whole top-level
/// domain.
fn search_domains(resolver: &str) -> impl Iterator<Item = &str> {
    let lines = resolver.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next(), Some("search" | "domain")).then_some(words)
    });
    lines.flatten().map(|domain| domain.trim_matches('.')).filter(|domain| domain.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESOLVER: &str = "nameserver 10.0.0.1\nsearch fn.svc.corp.example. example.net com\n";

    #[test]
    fn private_names_are_accepted_and_public_names_are_not() {
        let configured = ["metrics.example.org", "*.prod.example.org"].map(str::to_owned);
        let hosts = InternalHosts::from_parts(&configured, "Node1.example.com", RESOLVER);
        for host in [
            "10.1.2.3:8082",
            "127.0.0.1",
            "[::1]:8082",
            "[fe80::1]",
            "localhost:8082",
            "gateway",
            "gateway:8082",
            "gateway.openfaas.svc:8082",
            "gateway.openfaas.svc.cluster.local.:8082",
            "gateway.fn.svc.corp.example",
            "ip-10-0-0-1.ec2.internal",
            "nas.local",
            "node1.EXAMPLE.com:8082",
            "a.example.net",
            "metrics.example.org",
            "a.prod.example.org:8082",
        ] {
            assert!(hosts.allows(host), "{host}");
        }
        for host in [
            "rebind.evil",
            "a.com:8082",
            "localhost.evil.com",
            "127.0.0.1.evil.com",
            "evilexample.net",
            "example.net.evil.com",
            "prod.example.org",
            "svc.evil.com:8082",
            "10.0.0.1.nip.io",
        ] {
            assert!(!hosts.allows(host), "{host}");
        }
        let any = InternalHosts::from_parts(&["*".to_owned()], "node1", "");
        assert!(any.allows("rebind.evil"));
    }
}
