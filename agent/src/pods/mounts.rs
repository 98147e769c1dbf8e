//! Learns at once that a network namespace is gone: its mount's name leaves the folder.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use tokio::io::unix::AsyncFd;

/// The folder of mounts, watched.
#[derive(Debug)]
pub(crate) struct Mounts {
    inotify: AsyncFd<OwnedFd>,
    folder: PathBuf,
}

// === impl Mounts ===

impl Mounts {
    /// Watches the folder. There is none before the first pod of a node's life.
    #[expect(
        deprecated,
        reason = "its successor is unsafe for types that lie about their descriptor; an OwnedFd does not"
    )]
    pub(crate) fn watch(folder: &Path) -> io::Result<Self> {
        let inotify = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        // Who takes a namespace away unmounts it first, then removes the file on which it was.
        add_watch(&inotify, folder, WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::ONLYDIR)?;
        Ok(Self { inotify: AsyncFd::new(inotify)?, folder: folder.to_owned() })
    }

    /// Waits until something has left the folder; whatever else has by then is told with it.
    ///
    /// # Errors
    /// When the folder itself is gone.
    pub(crate) async fn removed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = Reader::new(self.inotify.get_ref(), &mut buffer);
            let (mut any, mut over) = (false, false);
            loop {
                match reader.next() {
                    Ok(event) => {
                        any = true;
                        over |= event.events().contains(ReadFlags::IGNORED);
                    }
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if over {
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} is gone", self.folder.display())));
            }
            if any {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn what_leaves_the_folder_is_told_and_what_comes_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("netns");
        assert!(Mounts::watch(&inside).is_err(), "there is none");
        fs::create_dir(&inside).unwrap();
        let mounts = Mounts::watch(&inside).unwrap();
        for name in ["a", "b", "c"] {
            fs::write(inside.join(name), "").unwrap();
        }
        let told = tokio::select! {
            biased;
            told = mounts.removed() => Some(told),
            () = tokio::task::yield_now() => None,
        };
        assert!(told.is_none(), "{told:?}");
        fs::remove_file(inside.join("a")).unwrap();
        mounts.removed().await.unwrap();
        fs::rename(inside.join("b"), folder.path().join("b")).unwrap();
        mounts.removed().await.unwrap();
        fs::remove_dir_all(&inside).unwrap();
        assert!(mounts.removed().await.unwrap_err().to_string().ends_with("netns is gone"));
        assert!(Mounts::watch(&inside).is_err());
    }
}
