//! Addresses that callbacks must not connect to: this process's own ports, the gateway, and providers.
//!
//! The client that chooses a callback's URL must not gain the access that only this process has. The gateway's own
//! address is distinguished, because a callback may invoke a function there (see [`super::local`]).

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::lookup_host;
use tokio::sync::Semaphore;

use crate::callback::allowlist::equivalent_addresses;
use gateway_base::base_url::BaseUrl;
use gateway_base::sync::lock_unpoisoned;

/// Lifetime of a name's resolved addresses.
const LOOKUP_TTL: Duration = Duration::from_secs(5);
/// Timeout of one name resolution.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// Owner of the address that a callback would connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressOwner {
    /// The worker's gateway.
    Gateway,
    /// Another port of this process, or a provider.
    Protected,
    Other,
}

/// The addresses of this process and of its upstreams.
#[derive(Debug, Default)]
pub struct OwnAddresses {
    gateway_ports: Vec<u16>,
    ports: Vec<u16>,
    gateways: Vec<Peer>,
    upstreams: Vec<Peer>,
}

impl OwnAddresses {
    /// Adds the port on which this process serves functions and the API.
    #[must_use]
    pub fn gateway_port(mut self, port: u16) -> Self {
        self.gateway_ports.push(port);
        self
    }

    /// Adds another port of this process.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.ports.push(port);
        self
    }

    /// Adds the gateway at `url`.
    #[must_use]
    pub fn gateway(mut self, url: &BaseUrl) -> Self {
        self.gateways.push(Peer::new(url));
        self
    }

    /// Adds a provider at `url`.
    #[must_use]
    pub fn upstream(mut self, url: &BaseUrl) -> Self {
        self.upstreams.push(Peer::new(url));
        self
    }

    /// Returns the owner of any of `addresses`, which `host` resolves to.
    pub async fn owner_of(&self, host: &str, addresses: &[SocketAddr]) -> AddressOwner {
        let addresses: Vec<SocketAddr> =
            addresses.iter().flat_map(equivalent_socket_addresses).collect();
        let is_on = |ports: &[u16]| {
            addresses.iter().any(|address| ports.contains(&address.port()) && is_local(*address))
        };
        if is_on(&self.gateway_ports) || matches_any(&self.gateways, host, &addresses).await {
            AddressOwner::Gateway
        } else if is_on(&self.ports) || matches_any(&self.upstreams, host, &addresses).await {
            AddressOwner::Protected
        } else {
            AddressOwner::Other
        }
    }
}

async fn matches_any(peers: &[Peer], host: &str, addresses: &[SocketAddr]) -> bool {
    for peer in peers {
        if peer.matches(host, addresses).await {
            return true;
        }
    }
    false
}

/// Returns `address` and the addresses that it maps to if there is a translator (such as NAT64).
fn equivalent_socket_addresses(address: &SocketAddr) -> impl Iterator<Item = SocketAddr> + use<> {
    let address = *address;
    equivalent_addresses(address.ip()).map(move |form| match address {
        // Keeps its scope id.
        SocketAddr::V6(whole) if form == IpAddr::V6(*whole.ip()) => address,
        _ => SocketAddr::new(form, address.port()),
    })
}

/// Returns whether `address` belongs to this machine, where it reaches all ports, whatever address they are bound to.
///
/// Only local addresses can be bound. (With `ip_nonlocal_bind` all can; then a callback to another machine is rejected
/// if its port is one of these.)
fn is_local(mut address: SocketAddr) -> bool {
    address.set_port(0);
    match UdpSocket::bind(address) {
        Ok(_) => true,
        // Other errors, such as too many open files, say nothing about the address.
        Err(error) => error.kind() != ErrorKind::AddrNotAvailable,
    }
}

/// A peer that is known by its URL.
#[derive(Debug)]
struct Peer {
    host: String,
    port: u16,
    /// Time and result of the last name resolution. A leaf: not held during one.
    last_lookup: Mutex<Option<(Instant, Arc<[SocketAddr]>)>>,
    /// Limits name resolutions to one at a time.
    lookup_permit: Semaphore,
}

impl Peer {
    fn new(url: &BaseUrl) -> Self {
        let host = without_trailing_dot(url.host()).to_ascii_lowercase();
        Self {
            host,
            port: url.port(),
            last_lookup: Mutex::default(),
            lookup_permit: Semaphore::new(1),
        }
    }

    /// Returns whether `host`, which resolves to `addresses`, is this peer.
    async fn matches(&self, host: &str, addresses: &[SocketAddr]) -> bool {
        let of_port = || addresses.iter().filter(|address| address.port() == self.port);
        if of_port().next().is_none() {
            return false;
        }
        // A name may resolve to different subsets of its addresses each time.
        if without_trailing_dot(host).eq_ignore_ascii_case(&self.host) {
            return true;
        }
        let peer_addresses = self.addresses().await;
        let peer_is_local = || peer_addresses.iter().any(|peer| is_local(*peer));
        of_port().any(|address| {
            peer_addresses.iter().any(|peer| peer.ip() == address.ip())
                || (is_local(*address) && peer_is_local())
        })
    }

    /// Returns the addresses of its name; those of the last resolution if it fails now.
    async fn addresses(&self) -> Arc<[SocketAddr]> {
        if let Some(fresh) = self.cached() {
            return fresh;
        }
        // The semaphore is never closed, and dropping this future releases the permit.
        let _permit = self.lookup_permit.acquire().await;
        if let Some(fresh) = self.cached() {
            return fresh;
        }
        let looked_up =
            tokio::time::timeout(LOOKUP_TIMEOUT, lookup_host((&*self.host, self.port))).await;
        let mut found = lock_unpoisoned(&self.last_lookup);
        let addresses = match (looked_up, &*found) {
            (Ok(Ok(addresses)), _) => {
                addresses.flat_map(|address| equivalent_socket_addresses(&address)).collect()
            }
            (_, Some((_, last))) => Arc::clone(last),
            (_, None) => Arc::from([]),
        };
        *found = Some((Instant::now(), Arc::clone(&addresses)));
        addresses
    }

    fn cached(&self) -> Option<Arc<[SocketAddr]>> {
        let found = lock_unpoisoned(&self.last_lookup);
        found
            .as_ref()
            .filter(|(at, _)| at.elapsed() < LOOKUP_TTL)
            .map(|(_, found)| Arc::clone(found))
    }
}

/// Removes the trailing dot of a fully qualified name.
fn without_trailing_dot(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn owner_of(own: &OwnAddresses, host: &str, address: &str) -> AddressOwner {
        own.owner_of(host, &[address.parse().unwrap()]).await
    }

    fn url(text: &str) -> BaseUrl {
        BaseUrl::parse(text).unwrap()
    }

    #[tokio::test]
    async fn an_own_port_is_recognized_on_every_local_address() {
        let own = OwnAddresses::default().gateway_port(8080).port(8082);
        for address in ["127.0.0.1", "127.3.2.1", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"]
        {
            for (port, expect) in [
                (8080, AddressOwner::Gateway),
                (8082, AddressOwner::Protected),
                (8081, AddressOwner::Other),
            ] {
                let address = format!("{address}:{port}");
                assert_eq!(owner_of(&own, "h", &address).await, expect, "{address}");
            }
        }
        for address in ["192.0.2.1:8080", "[2001:db8::1]:8082"] {
            assert_eq!(owner_of(&own, "h", address).await, AddressOwner::Other, "{address}");
        }
        // One of several addresses is enough.
        let both = ["192.0.2.1:8080", "127.0.0.1:8080"].map(|address| address.parse().unwrap());
        assert_eq!(own.owner_of("h", &both).await, AddressOwner::Gateway);
    }

    #[tokio::test]
    async fn an_upstream_is_recognized_by_its_name_and_by_its_addresses() {
        let own = OwnAddresses::default()
            .gateway(&url("http://gateway.invalid:80"))
            .upstream(&url("http://192.0.2.7:8081"))
            .upstream(&url("http://localhost:8081"));
        for (host, address, expect) in [
            ("GATEWAY.invalid.", "192.0.2.1:80", AddressOwner::Gateway),
            ("gateway.invalid", "192.0.2.1:81", AddressOwner::Other),
            ("other", "192.0.2.1:80", AddressOwner::Other),
            ("other", "192.0.2.7:8081", AddressOwner::Protected),
            ("other", "[64:ff9b::192.0.2.7]:8081", AddressOwner::Protected),
            ("other", "192.0.2.7:80", AddressOwner::Other),
            // A port on one local address may be bound to all of them.
            ("other", "127.9.9.9:8081", AddressOwner::Protected),
            ("other", "192.0.2.8:8081", AddressOwner::Other),
        ] {
            assert_eq!(owner_of(&own, host, address).await, expect, "{host} {address}");
        }
    }

    #[tokio::test]
    async fn a_failed_resolution_keeps_the_previous_addresses() {
        let peer = Peer::new(&url("http://nowhere.invalid:80"));
        assert!(peer.addresses().await.is_empty());
        let long_ago = Instant::now().checked_sub(LOOKUP_TTL * 2).unwrap();
        let last: Arc<[SocketAddr]> = Arc::from(["192.0.2.1:80".parse().unwrap()]);
        *peer.last_lookup.lock().unwrap() = Some((long_ago, Arc::clone(&last)));
        assert_eq!(peer.addresses().await, last);
    }
}
