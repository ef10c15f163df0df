// Who does what in a pass, and how long it took.
#pragma once

#include <time.h>

#include "cpu/gemm.h"
#include "cpu/threads.h"
#include "engine/network.h"

namespace vit::VIT_ISA {

using namespace engine;

// The range [0, size) in `count` nearly equal parts.
VIT_INLINE int64_t part(int64_t size, int64_t i, int64_t count) { return size * i / count; }

// Adds the time since the last lap to a phase; does nothing where `seconds` is null.
struct Clock {
  double* seconds;
  double last = 0;

  explicit Clock(double* seconds) : seconds(seconds) {
    if (seconds) last = now();
  }
  VIT_INLINE void lap(Phase phase) {
    if (!seconds) return;
    const double time = now();
    seconds[static_cast<int>(phase)] += time - last;
    last = time;
  }
  static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }
};

// Threads that take some images through the network together, and the calling thread's place among them: row part
// `row` of `rows`, column part `column` of `columns`. Threads beyond rows * columns only help with attention.
struct Team {
  int member, members;
  int64_t row, rows, column, columns;
  Barrier* all;
  Barrier* of_row;

  // Alone.
  Team() : member(0), members(1), row(0), rows(1), column(0), columns(1), all(nullptr), of_row(nullptr) {}

  template <class T>
  static Team of(int member, int members, int64_t M, int64_t C, Barrier* barriers) {
    Team team;
    const int64_t panels = panels_of<T>(C);
    team.member = member, team.members = members;
    team.rows = row_parts(members, M, panels);
    team.columns = min(max<int64_t>(members / team.rows, 1), panels);
    team.row = member / team.columns, team.column = member % team.columns;
    team.all = barriers, team.of_row = barriers + 1 + team.row;
    return team;
  }

  // Into how many parts the rows are divided; what is left of the threads divides the columns. A part of the rows pays
  // for a pass over the weights (as for 4 rows more), threads that share columns all normalise and quantize the same
  // rows (as for half a panel more).
  static int64_t row_parts(int members, int64_t M, int64_t panels) {
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t rows = 1; rows <= min<int64_t>(members, M); ++rows) {
      const int64_t share = ceil_div(M, rows) + 4, half_panels = 2 * ceil_div(panels, members / rows) + 1;
      if (share * half_panels <= best_cost) best = rows, best_cost = share * half_panels;
    }
    return best;
  }

  bool has_rows() const { return row < rows; }
};

}  // namespace vit::VIT_ISA
