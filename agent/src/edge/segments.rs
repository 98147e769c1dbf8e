//! Segments: granted before they exist, checked before they are shared, forgotten when nothing in them lives.

use std::os::fd::{AsFd, OwnedFd};

use lifl_api::node::{FromAgent, ToAgent};
use lifl_daemon::failpoint;
use lifl_ebpf_common::role;
use lifl_shm::SegmentReader;

use super::{Agent, AgentError, tell};
use crate::state::{Chain, GATEWAY_SEAT, Segment, SegmentMeta};

/// Rounds of the top that a dead writer's segment outlives: its partials are contained in the first one's model, and a
/// model of it is no longer served after the second.
const ORPHAN_ROUNDS: u8 = 2;

// === impl Agent ===

impl Agent {
    /// All segments of all chains, for a gateway that (re)started.
    pub(super) fn all_segments(&self) -> Vec<(FromAgent, OwnedFd)> {
        let state = self.state();
        state.chains.iter().flat_map(|(chain, entry)| segments_of(*chain, entry)).collect()
    }

    /// A word about segments from the gateway (`seat` is `None`) or a function.
    pub(super) async fn segment_word(
        &mut self,
        seat: Option<u32>,
        word: ToAgent,
        fds: Vec<OwnedFd>,
    ) -> Result<(), AgentError> {
        // A function speaks of its own chain, whatever number it writes.
        let own = seat.map(|seat| self.state().find(seat));
        let place = |chain: u32| match own {
            None => Some((chain, role::GATEWAY)),
            Some(found) => found,
        };
        match word {
            ToAgent::Grant { request, chain, bytes } => {
                if let Some((chain, writer)) = place(chain) {
                    self.grant(seat, request, chain, writer, bytes).await?;
                }
            }
            ToAgent::Segment { chain, segment, .. } => {
                if let (Some((chain, writer)), Some(fd)) = (place(chain), fds.into_iter().next()) {
                    self.share(seat, chain, writer, segment, fd).await?;
                }
            }
            ToAgent::DropSegment { chain, segment } => {
                if let Some((chain, _)) = place(chain) {
                    self.drop_segment(chain, segment, seat.unwrap_or(GATEWAY_SEAT)).await?;
                }
            }
            other => tracing::warn!(?other, "not about segments"),
        }
        Ok(())
    }

    pub(super) async fn grant(
        &mut self,
        seat: Option<u32>,
        request: u64,
        chain: u32,
        writer: u32,
        bytes: u64,
    ) -> Result<(), AgentError> {
        if seat.is_none() && !self.state().chains.contains_key(&chain) {
            // Coordinator and gateway are heard on two channels: its word of the chain is under way.
            self.early.push((request, chain, bytes));
            return Ok(());
        }
        let answer = {
            let mut state = self.state();
            let owner = seat.unwrap_or(GATEWAY_SEAT);
            // A writer asks for one after another. What it was granted and has not made, it was not told of, because one of the
            // two was restarted in between.
            let untold = state.chains.get(&chain).and_then(|entry| {
                let mut own = entry.segments.iter().filter(|(_, s)| s.meta.seat == owner && s.meta.orphan.is_none());
                own.find(|(_, s)| s.fd.is_none() && s.meta.bytes == bytes).map(|(id, _)| *id)
            });
            let known = state.chains.contains_key(&chain) && untold.is_none();
            let reserved = if known { state.quota.reserve(chain, bytes).map_err(|e| e.to_string()) } else { Ok(()) };
            state.note_peak();
            match (state.chains.get_mut(&chain), reserved) {
                (Some(entry), Ok(())) => {
                    let segment = untold.unwrap_or(entry.meta.next_segment);
                    entry.meta.next_segment = entry.meta.next_segment.max(segment + 1);
                    let meta = SegmentMeta { writer, seat: owner, bytes, orphan: None };
                    entry.segments.insert(segment, Segment { meta, fd: None });
                    Ok((segment, meta, entry.meta.clone()))
                }
                (_, Err(reason)) => Err(reason),
                (None, Ok(())) => Err(format!("chain {chain} does not exist here")),
            }
        };
        let word = match answer {
            Ok((segment, meta, chain_meta)) => {
                self.child.deposit(&format!("chain/{chain}"), &chain_meta, &[]).await?;
                self.child.deposit(&format!("segment/{chain}/{segment}"), &meta, &[]).await?;
                failpoint("agent.granted");
                FromAgent::Granted { request, chain, segment }
            }
            Err(reason) => FromAgent::Refused { request, chain, reason },
        };
        let to = self.writer_channel(seat);
        tell(to.as_ref(), &word, &[]).await;
        Ok(())
    }

    fn writer_channel(&self, seat: Option<u32>) -> Option<std::sync::Arc<lifl_daemon::Channel>> {
        match seat {
            None => self.gateway.clone(),
            Some(seat) => self.state().member(seat).map(|member| member.channel.clone()),
        }
    }

    /// Checks a new segment as any reader would, and hands it to the members.
    async fn share(
        &mut self,
        seat: Option<u32>,
        chain: u32,
        writer: u32,
        id: u32,
        fd: OwnedFd,
    ) -> Result<(), AgentError> {
        // An adopted writer tells all its segments again.
        let owner = seat.unwrap_or(GATEWAY_SEAT);
        let known = |entry: &Chain| entry.segments.get(&id).is_some_and(|s| s.meta.seat == owner && s.fd.is_some());
        let kept = FromAgent::Kept { chain, segment: id };
        if self.state().chains.get(&chain).is_some_and(known) {
            tell(self.writer_channel(seat).as_ref(), &kept, &[]).await;
            return Ok(());
        }
        failpoint("agent.checked");
        let meta = match self.check(chain, owner, id, &fd) {
            Ok(meta) => meta,
            Err(reason) => {
                tracing::warn!(chain, segment = id, writer, reason, "segment refused");
                if let Some(seat) = seat {
                    self.last_words(seat, format!("segment {id} refused: {reason}"));
                    self.ended(seat);
                }
                return Ok(());
            }
        };
        self.child.deposit(&format!("segment/{chain}/{id}"), &meta, &[fd.as_fd()]).await?;
        failpoint("agent.shared");
        let word = FromAgent::Segment { chain, segment: id, writer };
        for to in self.readers(chain, meta.seat) {
            tell(Some(&to), &word, &[fd.as_fd()]).await;
        }
        // Only now may the writer speak of what is in it: from here on its own death, or this process's, loses nothing.
        tell(self.writer_channel(seat).as_ref(), &kept, &[]).await;
        Ok(())
    }

    /// Notes a segment that is as it was granted.
    fn check(&self, chain: u32, owner: u32, id: u32, fd: &OwnedFd) -> Result<SegmentMeta, String> {
        let bytes = SegmentReader::map(fd, chain, id).map(|reader| reader.bytes()).map_err(|e| e.to_string())?;
        let mut state = self.state();
        let entry = state.chains.get_mut(&chain).and_then(|c| c.segments.get_mut(&id));
        let granted = entry.filter(|s| s.meta.seat == owner && s.fd.is_none() && bytes <= s.meta.bytes);
        let segment = granted.ok_or_else(|| format!("{bytes} bytes, not as granted"))?;
        segment.fd = Some(fd.try_clone().map_err(|e| e.to_string())?);
        Ok(segment.meta)
    }

    /// Everyone in the chain but the writer.
    fn readers(&self, chain: u32, writer_seat: u32) -> Vec<std::sync::Arc<lifl_daemon::Channel>> {
        let gateway = self.gateway.clone().filter(|_| writer_seat != GATEWAY_SEAT);
        let state = self.state();
        let members = state.chains.get(&chain).into_iter().flat_map(|entry| entry.members.values());
        // One that has no role yet is told of all segments with it.
        let members = members.filter(|member| member.meta.seat != writer_seat && member.socket.is_none());
        let members = members.map(|member| member.channel.clone());
        members.chain(gateway).collect()
    }

    /// Forgets a segment; only its writer may ask, or the agent itself for a dead one.
    async fn drop_segment(&mut self, chain: u32, id: u32, seat: u32) -> Result<(), AgentError> {
        let dropped = {
            let mut state = self.state();
            let Some(entry) = state.chains.get_mut(&chain) else { return Ok(()) };
            let owned = entry.segments.get(&id).is_some_and(|s| s.meta.seat == seat || s.meta.orphan.is_some());
            let dropped = if owned { entry.segments.remove(&id) } else { None };
            if let Some(segment) = &dropped {
                state.quota.give_back(chain, segment.meta.bytes);
            }
            dropped
        };
        if let Some(segment) = dropped {
            self.child.remove(&format!("segment/{chain}/{id}")).await?;
            for to in self.readers(chain, segment.meta.seat) {
                tell(Some(&to), &FromAgent::SegmentGone { chain, segment: id }, &[]).await;
            }
        }
        Ok(())
    }

    /// The writer on `seat` is dead: its segments stay readable while something in them may live.
    pub(super) async fn orphan(&mut self, chain: u32, seat: u32) -> Result<(), AgentError> {
        let (orphans, never_made): (Vec<_>, Vec<_>) = {
            let mut state = self.state();
            let Some(entry) = state.chains.get_mut(&chain) else { return Ok(()) };
            let own = entry.segments.iter_mut().filter(|(_, s)| s.meta.seat == seat && s.meta.orphan.is_none());
            let marked: Vec<_> = own
                .map(|(id, segment)| {
                    segment.meta.orphan = Some(ORPHAN_ROUNDS);
                    (*id, segment.meta, segment.fd.as_ref().and_then(|fd| fd.try_clone().ok()))
                })
                .collect();
            marked.into_iter().partition(|(_, _, fd)| fd.is_some())
        };
        for (id, meta, fd) in orphans {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            self.child.deposit(&format!("segment/{chain}/{id}"), &meta, &fds).await?;
        }
        for (id, ..) in never_made {
            self.drop_segment(chain, id, seat).await?;
        }
        Ok(())
    }

    /// The top has completed a round: orphans have one less to live.
    pub(super) async fn age_orphans(&mut self, chain: u32) -> Result<(), AgentError> {
        let ended: Vec<u32> = {
            let mut state = self.state();
            let Some(entry) = state.chains.get_mut(&chain) else { return Ok(()) };
            let orphans = entry.segments.iter_mut().filter_map(|(id, s)| Some((*id, s.meta.orphan.as_mut()?)));
            let aged = orphans.map(|(id, left)| {
                *left = left.saturating_sub(1);
                (id, *left)
            });
            aged.filter(|(_, left)| *left == 0).map(|(id, _)| id).collect()
        };
        for id in ended {
            self.drop_segment(chain, id, u32::MAX).await?;
        }
        Ok(())
    }
}

/// The segments of a chain as words with their descriptors.
pub(super) fn segments_of(chain: u32, entry: &Chain) -> Vec<(FromAgent, OwnedFd)> {
    let shared = entry.segments.iter().filter_map(|(id, segment)| {
        let fd = segment.fd.as_ref()?.try_clone().ok()?;
        Some((FromAgent::Segment { chain, segment: *id, writer: segment.meta.writer }, fd))
    });
    shared.collect()
}
