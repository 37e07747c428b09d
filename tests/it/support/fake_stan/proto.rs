//! The protocol messages of NATS Streaming, from the server's side.

use bytes::Bytes;
use prost::Message;

macro_rules! messages {
    ($($name:ident { $($field:ident: $type:ty = $kind:ident $tag:literal),* $(,)? })*) => {
        $(
            #[derive(Clone, PartialEq, Message)]
            pub(crate) struct $name {
                $(#[prost($kind, tag = $tag)] pub(crate) $field: $type),*
            }
        )*
    };
}

// `PingResponse` and `CloseResponse` both consist of an error text, which may be empty.
messages! {
    ConnectResponse {
        pub_prefix: String = string 1,
        sub_requests: String = string 2,
        unsub_requests: String = string 3,
        close_requests: String = string 4,
        error: String = string 5,
        sub_close_requests: String = string 6,
        ping_requests: String = string 7,
        ping_interval: i32 = int32 8,
        ping_max_out: i32 = int32 9,
        protocol: i32 = int32 10,
    }
    PubAck { guid: String = string 1, error: String = string 2 }
    SubscriptionRequest {
        client_id: String = string 1,
        subject: String = string 2,
        group: String = string 3,
        inbox: String = string 4,
        max_in_flight: i32 = int32 5,
        ack_wait: i32 = int32 6,
        durable_name: String = string 7,
        start_position: i32 = int32 10,
        start_time_delta: i64 = int64 12,
    }
    SubscriptionResponse { ack_inbox: String = string 2, error: String = string 3 }
    Ack { subject: String = string 1, sequence: u64 = uint64 2 }
    CloseRequest { client_id: String = string 1 }
    Complaint { error: String = string 1 }
}

/// Messages with byte members.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ConnectRequest {
    #[prost(string, tag = "1")]
    pub(crate) client_id: String,
    #[prost(string, tag = "2")]
    pub(crate) heartbeat_inbox: String,
    #[prost(int32, tag = "3")]
    pub(crate) protocol: i32,
    #[prost(bytes = "bytes", tag = "4")]
    pub(crate) connection: Bytes,
    #[prost(int32, tag = "5")]
    pub(crate) ping_interval: i32,
    #[prost(int32, tag = "6")]
    pub(crate) ping_max_out: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PubMsg {
    #[prost(string, tag = "1")]
    pub(crate) client_id: String,
    #[prost(string, tag = "2")]
    pub(crate) guid: String,
    #[prost(string, tag = "3")]
    pub(crate) subject: String,
    #[prost(bytes = "bytes", tag = "5")]
    pub(crate) data: Bytes,
    #[prost(bytes = "bytes", tag = "6")]
    pub(crate) connection: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct MsgProto {
    #[prost(uint64, tag = "1")]
    pub(crate) sequence: u64,
    #[prost(string, tag = "2")]
    pub(crate) subject: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(crate) data: Bytes,
    #[prost(int64, tag = "5")]
    pub(crate) timestamp: i64,
    #[prost(bool, tag = "6")]
    pub(crate) redelivered: bool,
    #[prost(uint32, tag = "7")]
    pub(crate) redelivery_count: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Ping {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) connection: Bytes,
}
