//! State of the server: clients, channels, and the progress of each queue group.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prost::Message;

use crate::support::fake_stan::proto::{Ack, MsgProto, SubscriptionRequest};

#[derive(Default)]
pub(super) struct Store {
    pub(super) clients: HashMap<String, Client>,
    pub(super) channels: HashMap<String, Vec<(Bytes, i64)>>,
    pub(super) groups: HashMap<String, Group>,
    /// Subscriptions without a queue group, from the first message on.
    followers: Vec<Follower>,
    /// Number of messages to refuse, by channel.
    pub(super) remaining_refusals: HashMap<String, usize>,
    /// Delay of publish acknowledgements, by channel.
    pub(super) delays: HashMap<String, Duration>,
    /// Prefix of channels that are not delivered.
    pub(super) withheld_channels: Option<String>,
    /// Channel whose acknowledgements are ignored.
    pub(super) lost_acks: Option<String>,
    /// Client id that is refused.
    pub(super) rejected_client: String,
    names: u64,
    last_time: i64,
}

#[derive(Clone)]
pub(super) struct Client {
    pub(super) connection: Bytes,
    pub(super) heartbeat_inbox: String,
    pub(super) missed: u32,
}

/// A subscription without a queue group.
struct Follower {
    request: SubscriptionRequest,
    next: usize,
}

/// The members of a durable queue group on a channel.
#[derive(Default)]
pub(super) struct Group {
    channel: String,
    members: Vec<Member>,
    /// Messages before this one were delivered at least once.
    next: usize,
    /// Unacknowledged messages: their member, deadline, and number of redeliveries.
    pub(super) pending: BTreeMap<u64, Pending>,
    redelivery: VecDeque<(u64, u32)>,
    pub(super) deliveries: usize,
    turn: usize,
}

pub(super) struct Pending {
    member: String,
    until: Instant,
    redeliveries: u32,
}

struct Member {
    request: SubscriptionRequest,
    acks: String,
}

impl Store {
    pub(super) fn append(&mut self, channel: &str, data: Bytes) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as i64;
        self.last_time = now.max(self.last_time + 1);
        self.channels.entry(channel.to_owned()).or_default().push((data, self.last_time));
    }

    /// Returns whether a message for `channel` is refused.
    pub(super) fn refuses(&mut self, channel: &str) -> bool {
        let left = self.remaining_refusals.get_mut(channel).filter(|left| **left > 0);
        left.map(|left| *left -= 1).is_some()
    }

    /// Registers a subscription. Returns its acknowledgement inbox; `None` if it is refused.
    pub(super) fn subscribe(&mut self, request: SubscriptionRequest) -> Option<String> {
        if self.withheld_channels.as_ref().is_some_and(|prefix| request.subject.starts_with(prefix))
        {
            return None;
        }
        self.names += 1;
        let acks = format!("_ACKS.{}", self.names);
        if request.group.is_empty() {
            // The test ends before the hour does.
            assert_eq!((request.start_position, request.start_time_delta), (3, 3_600_000_000_000));
            assert_eq!(request.durable_name, "");
            self.followers.push(Follower { request, next: 0 });
            return Some(acks);
        }
        assert_eq!(request.start_position, 4, "from the first message on");
        assert_eq!(request.durable_name, request.subject.replace('.', "_"));
        let group =
            self.groups.entry(format!("{}:{}", request.group, request.subject)).or_default();
        group.channel.clone_from(&request.subject);
        group.members.push(Member { request, acks: acks.clone() });
        Some(acks)
    }

    pub(super) fn acknowledge(&mut self, acks: &str, ack: &Ack) {
        if self.lost_acks.as_ref() == Some(&ack.subject) {
            return;
        }
        for group in self.groups.values_mut() {
            if group.members.iter().any(|member| member.acks == acks) {
                assert_eq!(ack.subject, group.channel);
                group.pending.remove(&ack.sequence);
                group.redelivery.retain(|(sequence, _)| *sequence != ack.sequence);
            }
        }
    }

    /// Removes a client: its unacknowledged messages go to others.
    pub(super) fn close(&mut self, id: &str) -> bool {
        for group in self.groups.values_mut() {
            group.members.retain(|member| member.request.client_id != id);
            group
                .requeue(|group, pending| !group.iter().any(|m| m.request.inbox == pending.member));
        }
        self.followers.retain(|follower| follower.request.client_id != id);
        self.clients.remove(id).is_some()
    }

    /// The messages to send now, with their inboxes.
    pub(super) fn deliver(&mut self) -> Vec<(String, Bytes)> {
        let now = Instant::now();
        let mut sent = Vec::new();
        for Follower { request, next } in &mut self.followers {
            let messages = self.channels.get(&request.subject).map_or(&[][..], Vec::as_slice);
            for (data, timestamp) in &messages[*next..] {
                *next += 1;
                let message = MsgProto {
                    sequence: *next as u64,
                    subject: request.subject.clone(),
                    data: data.clone(),
                    timestamp: *timestamp,
                    ..MsgProto::default()
                };
                sent.push((request.inbox.clone(), message.encode_to_vec().into()));
            }
        }
        for group in self.groups.values_mut() {
            group.requeue(|_, pending| pending.until <= now);
            let messages = self.channels.get(&group.channel).map_or(&[][..], Vec::as_slice);
            while let Some(delivery) = group.next_delivery(messages, now) {
                sent.push(delivery);
            }
        }
        sent
    }
}

impl Group {
    fn requeue(&mut self, is_over: impl Fn(&[Member], &Pending) -> bool) {
        let over: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| is_over(&self.members, pending))
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in over {
            let pending = self.pending.remove(&sequence).unwrap();
            self.redelivery.push_back((sequence, pending.redeliveries + 1));
        }
    }

    fn next_delivery(
        &mut self,
        messages: &[(Bytes, i64)],
        now: Instant,
    ) -> Option<(String, Bytes)> {
        let waits = !self.redelivery.is_empty() || self.next < messages.len();
        if !waits || self.members.is_empty() {
            return None;
        }
        // Round robin, so that a redelivery goes to another member if there is one.
        let member = (0..self.members.len()).find_map(|step| {
            let at = (self.turn + step) % self.members.len();
            let member = &self.members[at];
            let inbox = &member.request.inbox;
            let has = self.pending.values().filter(|pending| pending.member == *inbox).count();
            (has < member.request.max_in_flight as usize).then_some(at)
        })?;
        self.turn = member + 1;
        let request = &self.members[member].request;
        let (sequence, redeliveries) = self.redelivery.pop_front().unwrap_or_else(|| {
            self.next += 1;
            (self.next as u64, 0)
        });
        let until = now + Duration::from_secs(request.ack_wait as u64);
        let pending = Pending { member: request.inbox.clone(), until, redeliveries };
        self.pending.insert(sequence, pending);
        self.deliveries += 1;
        let (data, timestamp) = messages[sequence as usize - 1].clone();
        let message = MsgProto {
            sequence,
            subject: self.channel.clone(),
            data,
            timestamp,
            redelivered: redeliveries > 0,
            redelivery_count: redeliveries,
        };
        Some((request.inbox.clone(), message.encode_to_vec().into()))
    }
}
