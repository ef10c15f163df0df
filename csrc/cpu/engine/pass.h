// Some images on their way through the network: what every stage of it needs.
#pragma once

#include "cpu/engine/arena.h"
#include "cpu/engine/team.h"

namespace vit::VIT_ISA {

// Images [first, first + images) of the batch, in groups whose rows go through a block together. T: the type between
// the products.
template <class T>
struct Pass {
  const Forward& f;
  const Network& net;
  const Shape& s;
  const Team& team;
  Clock& clock;
  const int64_t first, images, group;
  float* tokens;
  T *qkv, *attended;
  float* pooled;  // after a last block that ends with the token: the class tokens
  float* normed_tokens;
  typename Buffers<T>::Own own;
  T *shared_hidden, *shared_inner;  // of the threads that share rows

  Pass(const Forward& f, const Buffers<T>& memory, const Team& team, int thread, Clock& clock, int64_t first,
       int64_t images, int64_t group)
      : f(f), net(*f.network), s(net.shape), team(team), clock(clock), first(first), images(images), group(group) {
    const int64_t slice = team.members > 1 ? 0 : thread;
    tokens = memory.tokens + slice * memory.slice_tokens;
    qkv = memory.qkv + slice * memory.slice_qkv;
    attended = memory.attended + slice * memory.slice_attended;
    pooled = memory.pooled + slice * memory.slice_pooled;
    normed_tokens = memory.pooled + thread * memory.slice_pooled;
    Arena arena{memory.threads + thread * memory.bytes_per_thread};
    own = Buffers<T>::own(s, arena);
    Arena of_leader{memory.threads + (thread - team.column) * memory.bytes_per_thread};
    const typename Buffers<T>::Own leader = Buffers<T>::own(s, of_leader);
    shared_hidden = leader.hidden, shared_inner = leader.inner;
  }

  // Whether of the last block only the class token is wanted.
  bool ends_with_token() const { return s.pool == Pool::token && !f.tokens[s.depth - 1]; }

  void meet() {
    if (team.members > 1) team.all->wait(team.members);
    clock.lap(Phase::wait);
  }
  void meet_columns() {
    if (team.columns < 2) return;
    team.of_row->wait(static_cast<int>(team.columns));
    clock.lap(Phase::wait);
  }

  // Calls f(begin, end) for pieces of at most kRows rows of this thread's part of M.
  template <class F>
  void for_rows(int64_t M, const F& f) const {
    if (!team.has_rows()) return;
    const int64_t begin = part(M, team.row, team.rows), end = part(M, team.row + 1, team.rows);
    const int64_t pieces = ceil_div(end - begin, kRows);
    for (int64_t i = 0; i < pieces; ++i)
      f(begin + part(end - begin, i, pieces), begin + part(end - begin, i + 1, pieces));
  }
};

}  // namespace vit::VIT_ISA
