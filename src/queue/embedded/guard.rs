//! redb trusts its file once it is open: a page that was changed behind its back can make it panic. Whatever touches
//! the file is called through here, and a panic becomes an error like any other damage.

use std::any::Any;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::queue::embedded::store::Result;

/// What `access` returns; damage if it panics. Nothing that `access` has changed may be used after that, but to be
/// dropped.
pub(super) fn guarded<T>(access: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(access)).unwrap_or_else(|panic| {
        Err(redb::Error::Corrupted(format!("the file cannot be understood: {}", text(&*panic))))
    })
}

/// Drops `value`, even if that panics.
pub(super) fn drop_guarded<T>(value: T) {
    let _ = guarded(|| {
        drop(value);
        Ok(())
    });
}

/// Whether `error` says that the file is damaged, so that trying again does not help.
pub(super) fn is_damage(error: &redb::Error) -> bool {
    match error {
        redb::Error::Corrupted(_)
        | redb::Error::RepairAborted
        | redb::Error::UpgradeRequired(_) => true,
        redb::Error::Io(error) => {
            matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
        }
        redb::Error::TableTypeMismatch { .. }
        | redb::Error::TypeDefinitionChanged { .. }
        | redb::Error::TableIsMultimap(_) => true,
        _ => false,
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason given")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_damage() {
        let panicked = guarded(|| -> Result<()> { panic!("page {}", 7) }).unwrap_err();
        assert!(is_damage(&panicked) && panicked.to_string().contains("page 7"), "{panicked}");
        let full = redb::Error::Io(std::io::Error::from(ErrorKind::StorageFull));
        assert!(!is_damage(&guarded(|| -> Result<()> { Err(full) }).unwrap_err()));
        assert!(guarded(|| Ok(())).is_ok());
    }
}
