//! The messages of the NATS Streaming protocol, with the fields that are used here. No I/O.

use bytes::Bytes;
use prost::Message;

/// The protocol version with client pings.
pub(super) const PROTOCOL_VERSION: i32 = 1;
/// `startPosition`: messages stored within the last `startTimeDelta`.
pub(super) const START_AT_TIME_DELTA: i32 = 3;
/// `startPosition`: all messages of the channel.
pub(super) const START_AT_FIRST: i32 = 4;

/// Errors of the server. The protocol has no error codes: these texts are part of it, and clients compare them.
/// The server does not know the client, which must register.
pub(super) const UNKNOWN_CLIENT: &str = "stan: invalid publish request";
/// Another client has registered with the same id.
pub(super) const ID_IN_USE: &str = "stan: clientID already registered";

/// Registers a client.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ConnectRequest {
    #[prost(string, tag = "1")]
    pub(super) client_id: String,
    #[prost(string, tag = "2")]
    pub(super) heartbeat_inbox: String,
    #[prost(int32, tag = "3")]
    pub(super) protocol: i32,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) connection: Bytes,
    /// In seconds.
    #[prost(int32, tag = "5")]
    pub(super) ping_interval: i32,
    #[prost(int32, tag = "6")]
    pub(super) ping_max_out: i32,
}

/// The subjects for a registered client's requests.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct ConnectResponse {
    #[prost(string, tag = "1")]
    pub(super) publish_prefix: String,
    #[prost(string, tag = "2")]
    pub(super) subscribe: String,
    #[prost(string, tag = "3")]
    pub(super) unsubscribe: String,
    #[prost(string, tag = "4")]
    pub(super) close: String,
    #[prost(string, tag = "5")]
    pub(super) error: String,
    #[prost(string, tag = "6")]
    pub(super) subscription_close: String,
    #[prost(string, tag = "7")]
    pub(super) ping: String,
    #[prost(int32, tag = "8")]
    pub(super) ping_interval: i32,
    #[prost(int32, tag = "9")]
    pub(super) ping_max_out: i32,
    #[prost(int32, tag = "10")]
    pub(super) protocol: i32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Publish {
    #[prost(string, tag = "1")]
    pub(super) client_id: String,
    #[prost(string, tag = "2")]
    pub(super) guid: String,
    #[prost(string, tag = "3")]
    pub(super) channel: String,
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) data: Bytes,
    #[prost(bytes = "bytes", tag = "6")]
    pub(super) connection: Bytes,
}

/// Confirms that a message is stored, unless `error` is set.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Published {
    #[prost(string, tag = "1")]
    pub(super) guid: String,
    #[prost(string, tag = "2")]
    pub(super) error: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Subscribe {
    #[prost(string, tag = "1")]
    pub(super) client_id: String,
    #[prost(string, tag = "2")]
    pub(super) channel: String,
    #[prost(string, tag = "3")]
    pub(super) group: String,
    #[prost(string, tag = "4")]
    pub(super) inbox: String,
    #[prost(int32, tag = "5")]
    pub(super) max_in_flight: i32,
    /// In seconds.
    #[prost(int32, tag = "6")]
    pub(super) ack_wait: i32,
    #[prost(string, tag = "7")]
    pub(super) durable_name: String,
    #[prost(int32, tag = "10")]
    pub(super) start_position: i32,
    /// In nanoseconds.
    #[prost(int64, tag = "12")]
    pub(super) start_time_delta: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Unsubscribe {
    #[prost(string, tag = "1")]
    pub(super) client_id: String,
    #[prost(string, tag = "2")]
    pub(super) channel: String,
    #[prost(string, tag = "3")]
    pub(super) ack_inbox: String,
    #[prost(string, tag = "4")]
    pub(super) durable_name: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Subscribed {
    #[prost(string, tag = "2")]
    pub(super) ack_inbox: String,
    #[prost(string, tag = "3")]
    pub(super) error: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Delivered {
    #[prost(uint64, tag = "1")]
    pub(super) sequence: u64,
    #[prost(string, tag = "2")]
    pub(super) channel: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) data: Bytes,
    /// Time of storage, in nanoseconds since 1970.
    #[prost(int64, tag = "5")]
    pub(super) timestamp: i64,
    #[prost(bool, tag = "6")]
    pub(super) redelivered: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Ack {
    #[prost(string, tag = "1")]
    pub(super) channel: String,
    #[prost(uint64, tag = "2")]
    pub(super) sequence: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Ping {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) connection: Bytes,
}

/// Confirms that the client is registered, unless `error` is set.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Pong {
    #[prost(string, tag = "1")]
    pub(super) error: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Close {
    #[prost(string, tag = "1")]
    pub(super) client_id: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Closed {
    #[prost(string, tag = "1")]
    pub(super) error: String,
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    /// The recorded messages of clients and server: subject and payload.
    fn transcript() -> Vec<(String, Vec<u8>)> {
        let lines = include_str!("../../../../tests/stan/transcript.jsonl").lines();
        let rows = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let messages = rows.filter_map(|row| {
            let payload = STANDARD.decode(row["payload_base64"].as_str()?).unwrap();
            let subject = row["line"].as_str()?.split(' ').nth(1)?;
            Some((subject.to_owned(), payload))
        });
        messages.collect()
    }

    #[track_caller]
    fn round_trip<M: Message + Default + std::fmt::Debug>(payload: &[u8]) -> M {
        let message = M::decode(payload).unwrap();
        assert_eq!(message.encode_to_vec(), payload, "{message:?}");
        message
    }

    #[test]
    fn recorded_messages_are_reencoded_identically() {
        let mut seen = 0;
        for (subject, payload) in transcript() {
            let subject = subject.strip_prefix("_STAN.").unwrap_or(&subject);
            match subject.split('.').next().unwrap() {
                "discover" if subject.ends_with(".pings") => drop(round_trip::<Ping>(&payload)),
                "discover" => {
                    let request: ConnectRequest = round_trip(&payload);
                    assert_eq!((request.protocol, request.ping_interval), (PROTOCOL_VERSION, 5));
                    assert!(request.client_id.ends_with("-gateway-host"));
                }
                "pub" => assert_eq!(round_trip::<Publish>(&payload).channel, "faas-request"),
                "acks" => assert_eq!(round_trip::<Published>(&payload).guid.len(), 22),
                "sub" => {
                    let request: Subscribe = round_trip(&payload);
                    assert_eq!((&*request.group, &*request.durable_name), ("faas", "faas-request"));
                    assert_eq!((request.max_in_flight, request.ack_wait), (1, 5));
                    assert_eq!(request.start_position, START_AT_FIRST);
                }
                "close" => drop(round_trip::<Close>(&payload)),
                _ if payload.is_empty() => {
                    drop((round_trip::<Pong>(&payload), round_trip::<Closed>(&payload)))
                }
                _ => inbox(&payload),
            }
            seen += 1;
        }
        assert_eq!(seen, 22);
    }

    /// Checks responses and deliveries, which are sent to inboxes.
    fn inbox(payload: &[u8]) {
        if payload.starts_with(b"\n\x16_STAN") {
            let response: ConnectResponse = round_trip(payload);
            assert_eq!(response.publish_prefix, "_STAN.pub.faas-cluster");
            assert_eq!(response.ping, "_STAN.discover.faas-cluster.pings");
        } else if payload.starts_with(b"\x12") {
            assert!(round_trip::<Subscribed>(payload).ack_inbox.starts_with("_INBOX."));
        } else if payload.starts_with(b"\x08") {
            let delivered: Delivered = round_trip(payload);
            assert!((1..=3).contains(&delivered.sequence) && !delivered.redelivered);
        } else {
            assert_eq!(round_trip::<Ack>(payload).channel, "faas-request");
        }
    }
}
