//! Headers of dead letters and of redriven calls. No I/O.
use async_nats::HeaderMap;

use crate::jetstream::wire::json;
use crate::jetstream::wire::message::{Message, *};
use crate::status::CallRecord;

impl Message {
    /// Returns the headers of the dead letter of a message that cannot be decoded.
    pub(in crate::jetstream) fn undecodable_letter(
        &self,
        status: &CallRecord,
        previous_seq: u64,
        subject: &str,
    ) -> HeaderMap {
        let mut headers = self.foreign_headers();
        headers.insert(STATUS_HEADER, json(status).as_str());
        headers.insert(PREVIOUS_SEQ_HEADER, previous_seq.to_string());
        headers.insert(RAW_SUBJECT_HEADER, subject);
        headers
    }

    /// Of the dead letter of a message that could not be decoded: returns the subject of the message.
    pub(in crate::jetstream) fn raw_subject(&self) -> Option<&str> {
        Some(self.headers.get(RAW_SUBJECT_HEADER)?.as_str())
    }

    /// Returns the headers without those for the server and those of a dead letter.
    fn foreign_headers(&self) -> HeaderMap {
        let added = [STATUS_HEADER, PREVIOUS_SEQ_HEADER, RAW_SUBJECT_HEADER, REDRIVEN_FROM_HEADER];
        let mut headers = HeaderMap::new();
        for (name, values) in self.headers.iter() {
            let name_text: &str = name.as_ref();
            let is_for_server = name_text
                .get(..SERVER_HEADER_PREFIX.len())
                .is_some_and(|prefix| prefix.eq_ignore_ascii_case(SERVER_HEADER_PREFIX));
            if !is_for_server && !added.contains(&name_text) {
                values.iter().for_each(|value| headers.append(name.clone(), value.clone()));
            }
        }
        headers
    }

    /// Returns the headers of a redriven call, which starts with no attempts. `number` is the sequence of the dead
    /// letter.
    pub(in crate::jetstream) fn redriven(&self, number: u64) -> HeaderMap {
        let mut headers = match self.raw_subject() {
            Some(_) => self.foreign_headers(),
            None => self.original_headers(),
        };
        headers.insert(REDRIVEN_FROM_HEADER, number.to_string());
        headers
    }

    /// Returns the sequence of the dead letter to remove when the redriven call is finished.
    pub(in crate::jetstream) fn dead_letter_seq(&self) -> Option<u64> {
        self.headers.get(REDRIVEN_FROM_HEADER)?.as_str().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::wire::message::tests::call;

    #[test]
    fn an_undecodable_message_keeps_its_headers_as_a_dead_letter() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (VERSION_HEADER, "9"),
            ("Of-Tomorrow", "1"),
            ("Of-Tomorrow", "2"),
            ("nats-msg-id", "x"),
            (PREVIOUS_SEQ_HEADER, "3"),
        ] {
            headers.append(name, value);
        }
        let message = Message::from_stored(headers, Bytes::from_static(b"raw"));
        let status = CallRecord::queued(&call());
        let letter = message.undecodable_letter(&status, 7, "faas.q.fn.echo.1");
        let letter = Message::from_stored(letter, message.body);
        assert_eq!((letter.stored_status(), letter.previous_seq()), (Some(status), Some(7)));
        assert_eq!(letter.raw_subject(), Some("faas.q.fn.echo.1"));
        let redriven = Message::from_stored(letter.redriven(8), letter.body);
        assert_eq!((redriven.stored_status(), redriven.raw_subject()), (None, None));
        assert_eq!(redriven.dead_letter_seq(), Some(8));
        assert_eq!(redriven.headers.get_all("Of-Tomorrow").count(), 2);
        assert_eq!(redriven.headers.get("nats-msg-id"), None);
        assert!(is_newer(&redriven.call().unwrap_err(), false));
    }
}
