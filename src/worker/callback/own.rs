//! Addresses that no callback may connect to: this process's own ports, and those that take its orders.
//!
//! A client that chooses a callback's URL must not gain what only this process may do. Its own gateway is told apart, since a
//! callback may call a function there (see [`super::local`]).

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::lookup_host;
use tokio::sync::Semaphore;

use crate::config::allowlist::equivalent_addresses;
use crate::config::base_url::BaseUrl;

/// The addresses of a name are looked up again after this time.
const FRESH: Duration = Duration::from_secs(5);
/// One look-up takes no longer.
const LOOKUP: Duration = Duration::from_secs(2);

/// To whom a callback would connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The gateway that the worker belongs to.
    Gateway,
    /// Another port of this process, or a provider.
    Guarded,
    Others,
}

/// The addresses of this process and of its upstreams.
#[derive(Debug, Default)]
pub struct Own {
    gateway_ports: Vec<u16>,
    ports: Vec<u16>,
    gateways: Vec<Peer>,
    upstreams: Vec<Peer>,
}

impl Own {
    /// This process serves functions and the API on `port`.
    #[must_use]
    pub fn gateway_port(mut self, port: u16) -> Self {
        self.gateway_ports.push(port);
        self
    }

    /// This process listens on `port` for something else.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.ports.push(port);
        self
    }

    /// The gateway is at `url`.
    #[must_use]
    pub fn gateway(mut self, url: &BaseUrl) -> Self {
        self.gateways.push(Peer::new(url));
        self
    }

    /// A provider is at `url`.
    #[must_use]
    pub fn upstream(mut self, url: &BaseUrl) -> Self {
        self.upstreams.push(Peer::new(url));
        self
    }

    /// To whom one would connect who takes any of `addresses`, which `host` resolves to.
    pub async fn whose(&self, host: &str, addresses: &[SocketAddr]) -> Whose {
        let addresses: Vec<SocketAddr> = addresses.iter().flat_map(all_forms).collect();
        let is_on = |ports: &[u16]| {
            addresses.iter().any(|address| ports.contains(&address.port()) && is_here(*address))
        };
        if is_on(&self.gateway_ports) || is_among(&self.gateways, host, &addresses).await {
            Whose::Gateway
        } else if is_on(&self.ports) || is_among(&self.upstreams, host, &addresses).await {
            Whose::Guarded
        } else {
            Whose::Others
        }
    }
}

async fn is_among(peers: &[Peer], host: &str, addresses: &[SocketAddr]) -> bool {
    for peer in peers {
        if peer.is(host, addresses).await {
            return true;
        }
    }
    false
}

/// `address`, and those that it leads to where a translator is in place.
fn all_forms(address: &SocketAddr) -> impl Iterator<Item = SocketAddr> + use<> {
    let address = *address;
    equivalent_addresses(address.ip()).map(move |form| match address {
        // Its scope belongs to it.
        SocketAddr::V6(whole) if form == IpAddr::V6(*whole.ip()) => address,
        _ => SocketAddr::new(form, address.port()),
    })
}

/// Whether `address` is one of this machine, on which it is reached whatever its ports listen on.
///
/// Only an address of this machine can be bound. (Where `ip_nonlocal_bind` is set, every one can; then a callback to
/// another machine is refused if its port is one of ours.)
fn is_here(mut address: SocketAddr) -> bool {
    address.set_port(0);
    match UdpSocket::bind(address) {
        Ok(_) => true,
        // A shortage of files says nothing of the address.
        Err(error) => error.kind() != ErrorKind::AddrNotAvailable,
    }
}

/// One that is known by a URL.
#[derive(Debug)]
struct Peer {
    host: String,
    port: u16,
    /// When it was looked up last, and what was found.
    found: Mutex<Option<(Instant, Arc<[SocketAddr]>)>>,
    /// One look-up at a time.
    turn: Semaphore,
}

impl Peer {
    fn new(url: &BaseUrl) -> Self {
        let host = bare(url.host()).to_ascii_lowercase();
        Self { host, port: url.port(), found: Mutex::default(), turn: Semaphore::new(1) }
    }

    async fn is(&self, host: &str, addresses: &[SocketAddr]) -> bool {
        let of_port = || addresses.iter().filter(|address| address.port() == self.port);
        if of_port().next().is_none() {
            return false;
        }
        // A name may resolve to a part of its addresses at a time.
        if bare(host).eq_ignore_ascii_case(&self.host) {
            return true;
        }
        let own = self.addresses().await;
        let own_is_here = || own.iter().any(|own| is_here(*own));
        of_port().any(|address| {
            own.iter().any(|own| own.ip() == address.ip()) || (is_here(*address) && own_is_here())
        })
    }

    /// The addresses that its name resolves to: those that were found last if it does not resolve now.
    async fn addresses(&self) -> Arc<[SocketAddr]> {
        if let Some(fresh) = self.fresh() {
            return fresh;
        }
        // The semaphore is never closed, and the permit goes back if this is dropped.
        let _turn = self.turn.acquire().await;
        if let Some(fresh) = self.fresh() {
            return fresh;
        }
        let looked_up = tokio::time::timeout(LOOKUP, lookup_host((&*self.host, self.port))).await;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let addresses = match (looked_up, &*found) {
            (Ok(Ok(addresses)), _) => addresses.flat_map(|address| all_forms(&address)).collect(),
            (_, Some((_, last))) => Arc::clone(last),
            (_, None) => Arc::from([]),
        };
        *found = Some((Instant::now(), Arc::clone(&addresses)));
        addresses
    }

    fn fresh(&self) -> Option<Arc<[SocketAddr]>> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.as_ref().filter(|(at, _)| at.elapsed() < FRESH).map(|(_, found)| Arc::clone(found))
    }
}

/// A host without the dot that ends a full name.
fn bare(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn whose(own: &Own, host: &str, address: &str) -> Whose {
        own.whose(host, &[address.parse().unwrap()]).await
    }

    fn url(text: &str) -> BaseUrl {
        BaseUrl::parse(text).unwrap()
    }

    #[tokio::test]
    async fn a_port_is_ours_on_every_address_of_this_machine() {
        let own = Own::default().gateway_port(8080).port(8082);
        for address in ["127.0.0.1", "127.3.2.1", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"]
        {
            for (port, expect) in
                [(8080, Whose::Gateway), (8082, Whose::Guarded), (8081, Whose::Others)]
            {
                let address = format!("{address}:{port}");
                assert_eq!(whose(&own, "h", &address).await, expect, "{address}");
            }
        }
        for address in ["192.0.2.1:8080", "[2001:db8::1]:8082"] {
            assert_eq!(whose(&own, "h", address).await, Whose::Others, "{address}");
        }
        // One of several is enough.
        let both = ["192.0.2.1:8080", "127.0.0.1:8080"].map(|it| it.parse().unwrap());
        assert_eq!(own.whose("h", &both).await, Whose::Gateway);
    }

    #[tokio::test]
    async fn an_upstream_is_known_by_its_name_and_by_its_addresses() {
        let own = Own::default()
            .gateway(&url("http://gateway.invalid:80"))
            .upstream(&url("http://192.0.2.7:8081"))
            .upstream(&url("http://localhost:8081"));
        for (host, address, expect) in [
            ("GATEWAY.invalid.", "192.0.2.1:80", Whose::Gateway),
            ("gateway.invalid", "192.0.2.1:81", Whose::Others),
            ("other", "192.0.2.1:80", Whose::Others),
            ("other", "192.0.2.7:8081", Whose::Guarded),
            ("other", "[64:ff9b::192.0.2.7]:8081", Whose::Guarded),
            ("other", "192.0.2.7:80", Whose::Others),
            // What listens on one address of this machine may listen on all.
            ("other", "127.9.9.9:8081", Whose::Guarded),
            ("other", "192.0.2.8:8081", Whose::Others),
        ] {
            assert_eq!(whose(&own, host, address).await, expect, "{host} {address}");
        }
    }

    #[tokio::test]
    async fn a_name_that_does_not_resolve_any_more_keeps_its_addresses() {
        let peer = Peer::new(&url("http://nowhere.invalid:80"));
        assert!(peer.addresses().await.is_empty());
        let long_ago = Instant::now().checked_sub(FRESH * 2).unwrap();
        let last: Arc<[SocketAddr]> = Arc::from(["192.0.2.1:80".parse().unwrap()]);
        *peer.found.lock().unwrap() = Some((long_ago, Arc::clone(&last)));
        assert_eq!(peer.addresses().await, last);
    }
}
