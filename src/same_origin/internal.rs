//! By which names a port for machines may be asked. A web page can have a name of its own lead here (DNS rebinding), and
//! a browser then takes what this port says for the page's own. Such a name is a public one; scrapers come by IP
//! address or by a name of the network that they share with this machine.

use std::fs;
use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::HOST;

use crate::error::Error;
use crate::same_origin::{Foreign, Names, check, without_port};

/// Ends of names that never lead from the internet to a private network: reserved (RFC 6761, 6762, 8375, ICANN's
/// `internal`), or used by Kubernetes.
const PRIVATE: [&str; 8] =
    ["localhost", "local", "localdomain", "internal", "home.arpa", "lan", "svc", "test"];

/// The names that are accepted.
#[derive(Debug)]
pub struct InternalNames {
    /// Whole names: those of the setting, and this machine's own.
    names: Vec<String>,
    /// Ends of names, without their first dot.
    domains: Vec<String>,
    any: bool,
}

impl InternalNames {
    /// The names of `metrics_hosts`, and those that this machine's own configuration knows.
    pub fn new(configured: &[String]) -> Self {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        Self::of(configured, &name, &resolver)
    }

    fn of(configured: &[String], own_name: &str, resolver: &str) -> Self {
        let configured = configured.iter().map(String::as_str);
        let (domains, names): (Vec<&str>, Vec<&str>) =
            configured.clone().partition(|name| name.starts_with("*."));
        let domains = domains.iter().map(|domain| &domain[2..]);
        let domains = domains.chain(search_domains(resolver)).chain(PRIVATE);
        Self {
            names: names.into_iter().chain([own_name]).map(str::to_ascii_lowercase).collect(),
            domains: domains.map(str::to_ascii_lowercase).collect(),
            any: configured.clone().any(|name| name == "*"),
        }
    }

    /// Whether `host`, with or without a port, is accepted.
    fn accept(&self, host: &str) -> bool {
        let name = without_port(host);
        let literal = name.trim_start_matches('[').trim_end_matches(']');
        // A name without a dot is looked up in the search domains of the client, not on the internet.
        if self.any || literal.parse::<IpAddr>().is_ok() || !name.contains('.') {
            return true;
        }
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        self.names.contains(&name)
            || self.domains.iter().any(|domain| {
                name.strip_suffix(domain.as_str()).is_some_and(|before| before.ends_with('.'))
            })
    }
}

/// The domains in which this machine looks for names without a dot. One of a single label would be a whole top-level
/// domain.
fn search_domains(resolver: &str) -> impl Iterator<Item = &str> {
    let lines = resolver.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next(), Some("search" | "domain")).then_some(words)
    });
    lines.flatten().map(|domain| domain.trim_matches('.')).filter(|domain| domain.contains('.'))
}

/// Lets a request pass that no web page of others can have made.
pub async fn guard_internal(
    State(names): State<Arc<InternalNames>>,
    request: Request,
    next: Next,
) -> Response {
    let headers = request.headers();
    let host = request.uri().authority().map(http::uri::Authority::as_str);
    // What is no text is no name of ours.
    let host = host.or_else(|| Some(headers.get(HOST)?.to_str().unwrap_or("?.?")));
    let checked = match host {
        Some(host) if !names.accept(host) => Err(
            "the metrics port is not called by this name: use an IP address, or add the name to metrics_hosts",
        ),
        _ => check(headers, Names::Any).map_err(Foreign::reason),
    };
    match checked {
        Ok(()) => next.run(request).await,
        Err(reason) => Error::Forbidden(reason).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESOLVER: &str = "nameserver 10.0.0.1\nsearch fn.svc.corp.example. example.net com\n";

    #[test]
    fn names_of_the_own_network_are_accepted_and_public_ones_are_not() {
        let configured = ["metrics.example.org", "*.prod.example.org"].map(str::to_owned);
        let names = InternalNames::of(&configured, "Node1.example.com", RESOLVER);
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
            assert!(names.accept(host), "{host}");
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
            assert!(!names.accept(host), "{host}");
        }
        let any = InternalNames::of(&["*".to_owned()], "node1", "");
        assert!(any.accept("rebind.evil"));
    }
}
