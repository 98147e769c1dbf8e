//! Functions: started, given their socket and role, converted, replaced when they die.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use lifl_api::node::{FromAgent, NodeEvent, RoleConfig, ToAgent};
use lifl_daemon::{Channel, failpoint};
use lifl_ebpf_common::{
    LAYOUT_VERSION,
    maps::{MAX_MEMBERS, Member as Seat, RouteKey},
    role,
};

use super::{Agent, AgentError, Event, MAX_DEATHS, hear, segments::segments_of, tell};
use crate::{
    plan::{Change, changes},
    process,
    state::{Member, MemberMeta},
};

// === impl Agent ===

impl Agent {
    /// Brings the functions of a chain to its plan.
    pub(super) async fn carry_out(&mut self, chain: u32) -> Result<(), AgentError> {
        let todo = {
            let state = self.state();
            let Some(entry) = state.chains.get(&chain) else { return Ok(()) };
            let running = entry.members.iter().map(|(role, m)| (*role, m.meta.config.clone())).collect();
            changes(&running, &entry.meta.plan)
        };
        for change in todo {
            match change {
                Change::Configure { config } => self.give_role(chain, config.role, config).await?,
                Change::Convert { from, config } => self.convert(chain, from, config).await?,
                Change::Start { config } => self.start(chain, config).await?,
                Change::Stop { role } => self.stop(chain, role).await?,
            }
        }
        Ok(())
    }

    async fn start(&mut self, chain: u32, config: RoleConfig) -> Result<(), AgentError> {
        let role = config.role;
        let Some(seat) = self.state().free_seat(MAX_MEMBERS) else {
            tracing::error!(chain, role, "no seat is free: too many functions on this node");
            return Ok(());
        };
        let uid = rustix::process::geteuid().is_root().then_some(self.config.uid_base + seat);
        let spawned = process::spawn(uid, self.config.log, &self.config.log_level)?;
        let group = format!("{chain}-{role}-{seat}");
        let sums = config.model_bytes.max(config.elements * if config.fixed_scale.is_some() { 8 } else { 4 });
        if let Err(error) = self.cgroups.apply(&group, spawned.pid, self.config.function_overhead + 5 * sums) {
            tracing::warn!(%error, chain, role, "function without limits: its cgroup cannot be set up");
        }
        let (socket, near) = lifl_ebpf::pair()?;
        let meta = MemberMeta { chain, seat, pid: spawned.pid, config, settled: false };
        let fds = [spawned.control.as_fd(), near.as_fd(), spawned.pidfd.as_fd()];
        // Before the seat is taken: a successor that knew nothing of it would take it again, and be refused.
        self.child.deposit(&format!("member/{seat}"), &meta, &fds).await?;
        self.path.register(Some(socket.as_fd()), near.as_fd(), Seat { chain, role, counter: seat, reserved: 0 })?;
        failpoint("agent.registered");
        self.path.set_route(RouteKey { chain, dst: role }, seat)?;
        let channel = Arc::new(Channel::new(spawned.control)?);
        let member = Member {
            meta,
            channel: channel.clone(),
            pidfd: Arc::new(spawned.pidfd),
            socket: Some(socket),
            adopted: false,
            last_words: None,
        };
        if let Some(entry) = self.state().chains.get_mut(&chain) {
            entry.members.insert(role, member);
        }
        failpoint("agent.started");
        hear(channel, self.events.clone(), move |word, fds| Event::Function(seat, word, fds), Some(Event::Ended(seat)));
        Ok(())
    }

    /// The function works in another role from its next descriptor on; what it held is its successor's there.
    async fn convert(&mut self, chain: u32, from: u32, config: RoleConfig) -> Result<(), AgentError> {
        let (role, seat) = {
            let mut state = self.state();
            let Some(entry) = state.chains.get_mut(&chain) else { return Ok(()) };
            let Some(member) = entry.members.remove(&from) else { return Ok(()) };
            let (role, seat) = (config.role, member.meta.seat);
            entry.members.insert(role, member);
            (role, seat)
        };
        tracing::info!(chain, from, role, "function reused in another role");
        self.path.remove_route(RouteKey { chain, dst: from })?;
        self.path.set_role(seat, role)?;
        self.path.set_route(RouteKey { chain, dst: role }, seat)?;
        self.give_role(chain, role, config).await
    }

    /// Tells a function what to be; it answers when it is.
    async fn give_role(&mut self, chain: u32, role: u32, config: RoleConfig) -> Result<(), AgentError> {
        let (channel, meta, ready) = {
            let mut state = self.state();
            let member = state.chains.get_mut(&chain).and_then(|c| c.members.get_mut(&role));
            let Some(member) = member else { return Ok(()) };
            member.meta.config = config.clone();
            member.meta.settled = false;
            (member.channel.clone(), member.meta.clone(), member.socket.is_none())
        };
        self.child.deposit(&format!("member/{}", meta.seat), &meta, &[]).await?;
        // A function that is not ready yet gets its role with its socket.
        if ready {
            tell(Some(&channel), &FromAgent::Role { chain, config, failpoint: None }, &[]).await;
        }
        Ok(())
    }

    async fn stop(&mut self, chain: u32, role: u32) -> Result<(), AgentError> {
        let member = self.state().chains.get_mut(&chain).and_then(|entry| entry.members.remove(&role));
        let Some(member) = member else { return Ok(()) };
        let seat = member.meta.seat;
        self.leave_path(seat)?;
        process::kill(member.pidfd.as_fd());
        self.child.remove(&format!("member/{seat}")).await?;
        self.orphan(chain, seat).await?;
        self.bury(chain, role, seat, member.pidfd);
        Ok(())
    }

    fn leave_path(&self, seat: u32) -> Result<(), AgentError> {
        if let Ok(counters) = self.path.counters(seat) {
            self.state().remember(counters);
        }
        Ok(self.path.unregister(seat)?)
    }

    /// Waits for the end of a function and removes its cgroup, aside: the kernel takes its time to return memory.
    fn bury(&self, chain: u32, role: u32, seat: u32, pidfd: Arc<OwnedFd>) {
        let cgroups = self.cgroups.clone();
        tokio::task::spawn_blocking(move || {
            process::reap(&pidfd);
            cgroups.remove(&format!("{chain}-{role}-{seat}"));
        });
    }

    /// A word of a function.
    pub(super) async fn function_word(
        &mut self,
        seat: u32,
        word: ToAgent,
        fds: Vec<OwnedFd>,
    ) -> Result<(), AgentError> {
        match word {
            ToAgent::Ready { layout } if layout == LAYOUT_VERSION => self.settle_in(seat).await?,
            ToAgent::Ready { layout } => {
                self.last_words(seat, format!("it speaks layout {layout} of descriptors, this node {LAYOUT_VERSION}"));
                self.ended(seat);
            }
            ToAgent::RoleTaken { role } => {
                let meta = self.state().member(seat).filter(|m| m.meta.config.role == role).map(|member| {
                    member.meta.settled = true;
                    member.meta.clone()
                });
                if let Some(meta) = meta {
                    self.child.deposit(&format!("member/{seat}"), &meta, &[]).await?;
                    self.report_settled().await;
                }
            }
            ToAgent::Failed { reason } => self.last_words(seat, reason),
            ToAgent::Folded { ns, .. } => {
                failpoint("agent.folded");
                let top = {
                    let mut state = self.state();
                    let Some((chain, at)) = state.find(seat) else { return Ok(()) };
                    if let Some(entry) = state.chains.get_mut(&chain) {
                        entry.folded_ns += ns;
                        entry.deaths = 0;
                    }
                    (at == role::TOP).then_some(chain)
                };
                if let Some(chain) = top {
                    self.age_orphans(chain).await?;
                }
            }
            word => self.segment_word(Some(seat), word, fds).await?,
        }
        Ok(())
    }

    pub(super) fn last_words(&self, seat: u32, reason: String) {
        if let Some(member) = self.state().member(seat) {
            tracing::warn!(seat, reason, "function failed");
            member.last_words = Some(reason);
        }
    }

    /// The function has begun: gives it socket, role and the chain's segments.
    async fn settle_in(&mut self, seat: u32) -> Result<(), AgentError> {
        let (channel, chain, config, socket, segments) = {
            let mut state = self.state();
            let Some((chain, role)) = state.find(seat) else { return Ok(()) };
            let Some(entry) = state.chains.get_mut(&chain) else { return Ok(()) };
            let segments = segments_of(chain, entry);
            let Some(member) = entry.members.get_mut(&role) else { return Ok(()) };
            let Some(socket) = member.socket.take() else { return Ok(()) };
            (member.channel.clone(), chain, member.meta.config.clone(), socket, segments)
        };
        let armed = self.take_failpoint(config.role);
        tell(Some(&channel), &FromAgent::Role { chain, config, failpoint: armed }, &[]).await;
        for (word, fd) in segments {
            tell(Some(&channel), &word, &[fd.as_fd()]).await;
        }
        tell(Some(&channel), &FromAgent::DataSocket, &[socket.as_fd()]).await;
        failpoint("agent.settled");
        Ok(())
    }

    /// The failpoint for the first function in a role (tests): `role:name:n`.
    fn take_failpoint(&mut self, role: u32) -> Option<String> {
        let prefix = match role {
            role::TOP => "top:",
            role::MIDDLE => "middle:",
            _ => "leaf:",
        };
        let armed = self.failpoint.take_if(|text| text.starts_with(prefix))?;
        armed.strip_prefix(prefix).map(str::to_owned)
    }

    /// A function closed its channel: it is ended, and replaced once all that it sent is delivered.
    pub(super) fn ended(&mut self, seat: u32) {
        let Some((pidfd, words)) = self.state().member(seat).map(|m| (m.pidfd.clone(), m.last_words.take())) else {
            return;
        };
        process::kill(pidfd.as_fd());
        failpoint("agent.ended");
        let (events, path) = (self.events.clone(), self.path.clone());
        tokio::task::spawn_blocking(move || {
            let status = process::reap(&pidfd);
            let reason = words.unwrap_or(status);
            path.on_drained(seat, move || drop(events.send(Event::Drained(seat, reason))));
        });
    }

    /// Starts the successor of a dead function and tells who needs to know.
    pub(super) async fn replace(&mut self, seat: u32, reason: &str) -> Result<(), AgentError> {
        let dead = {
            let mut state = self.state();
            let Some((chain, role)) = state.find(seat) else { return Ok(()) };
            let Some(entry) = state.chains.get_mut(&chain) else { return Ok(()) };
            entry.deaths += 1;
            entry.members.remove(&role).map(|member| (chain, role, entry.deaths, entry.meta.revision, member))
        };
        let Some((chain, role, deaths, revision, member)) = dead else { return Ok(()) };
        tracing::warn!(chain, role, reason, "function died");
        self.leave_path(seat)?;
        self.child.remove(&format!("member/{seat}")).await?;
        failpoint("agent.buried");
        self.orphan(chain, seat).await?;
        self.bury(chain, role, seat, member.pidfd);
        let event = NodeEvent::MemberDied { chain, role, reason: reason.to_owned() };
        tell(self.coordinator.as_ref(), &event, &[]).await;
        if deaths > MAX_DEATHS {
            let reason = format!("functions died {deaths} times, last: {reason}");
            let event = NodeEvent::PlanFailed { chain, revision, reason };
            tell(self.coordinator.as_ref(), &event, &[]).await;
            return Ok(());
        }
        self.carry_out(chain).await?;
        failpoint("agent.replaced");
        tell(self.gateway.as_ref(), &FromAgent::Replaced { chain, role }, &[]).await;
        Ok(())
    }

    /// Ends a chain: its functions, its memory, its accounts.
    pub(super) async fn remove_chain(&mut self, chain: u32) -> Result<(), AgentError> {
        let roles: Vec<u32> = {
            let state = self.state();
            state.chains.get(&chain).into_iter().flat_map(|entry| entry.members.keys().copied()).collect()
        };
        for role in roles {
            self.stop(chain, role).await?;
        }
        self.path.remove_route(RouteKey { chain, dst: role::GATEWAY })?;
        let segments: Vec<u32> = {
            let mut state = self.state();
            state.quota.remove_chain(chain);
            state.chains.remove(&chain).into_iter().flat_map(|entry| entry.segments.into_keys()).collect()
        };
        for segment in segments {
            self.child.remove(&format!("segment/{chain}/{segment}")).await?;
            tell(self.gateway.as_ref(), &FromAgent::SegmentGone { chain, segment }, &[]).await;
        }
        Ok(self.child.remove(&format!("chain/{chain}")).await?)
    }
}
