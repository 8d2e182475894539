// Tasks over threads, and the sums over tasks.

// Frames are kept for all steps where they take less than this, in bytes for each task at work; else the adjoint
// recursion computes values and gradients of a step once more.
constexpr int64_t kKeepFrames = int64_t(96) << 20;
// Transposed filters are kept too where all that is kept stays in the second cache; from further away they come no faster
// than they are made.
constexpr int64_t kKeepTransposed = int64_t(1) << 20;
// Tasks are worked on side by side where they take less than this for each thread; else one after the other by all
// threads, which rules of few samples do not keep equally busy.
constexpr int64_t kSideBySide = int64_t(48) << 20;
// Fewer tasks than this do not go abreast: half as many pieces of work might leave threads without any.
constexpr int64_t kManyTasks = 16;
constexpr int64_t kMostWorkers = 1024;

// A task without memory, and how much it needs: `asking` for the frame of the query set, `bytes` for all else.
template <class T>
Task<T> plan_task(const Call<T>& call, const Network& net, const Machine& machine, int64_t& bytes,
                  int64_t& asking) {
  Task<T> task{call, machine, net};
  const int64_t frame = (2 * net.frame_sample + net.frame_saved_sample) * call.support.samples * sizeof(T);
  const bool keeps = call.mode == kMeta && !call.first_order && call.steps <= kKeepFrames / larger<int64_t>(1, frame);
  task.kept_frames = keeps ? call.steps : 0;
  const int64_t step = frame + (net.adapted + net.transposed) * int64_t(sizeof(T));
  task.kept_transposed = keeps && call.steps && call.steps <= kKeepTransposed / step;
  Bump m{nullptr, 0}, query{nullptr, 0};
  m.take<Task<T>>(1);
  task.lay_out(m, query);
  bytes = m.used, asking = query.used;
  return task;
}

// The same with its memory, at the beginning of which it lies itself. null `query`: all of it is in one piece.
template <class T>
Task<T>* place_task(const Task<T>& planned, char* memory, char* query, int64_t bytes) {
  Bump m{memory, 0}, asking{query ? query : memory + bytes, 0};
  Task<T>* task = new (m.take<Task<T>>(1)) Task<T>(planned);
  task->lay_out(m, asking);
  task->begin();
  return task;
}

// Sums over tasks, in the engine's layout of one: of gradients (parameters, rows of rates) and of single rates. Tasks are
// added up in groups, and those as a tree, so that sums have an order that no number of threads changes.
template <class T>
struct Sums {
  bool of_gradients;
  int64_t rows, numbers;     // of rates
  int64_t groups, adapted;   // elements of a row
  T* parameters;
  double* rates;

  int64_t extent() const { return (of_gradients + rows) * adapted; }
  T* theta(int64_t group) const { return of_gradients ? parameters + group * extent() : nullptr; }
  T* rate_rows(int64_t group) const {
    return rows ? parameters + group * extent() + of_gradients * adapted : nullptr;
  }
  double* rate_numbers(int64_t group) const { return numbers ? rates + group * numbers : nullptr; }

  void lay_out(Bump& m) {
    rates = m.take<double>(groups * numbers);
    parameters = m.take<T>(groups * extent());
  }
  // The first task of a group sets the sum of gradients; to those of rates all tasks add.
  void clear() const {
    for (int64_t i = 0; i < groups * numbers; i++) rates[i] = 0;
    for (int64_t i = 0; rows && i < groups * extent(); i++) parameters[i] = 0;
  }
  // Groups from `begin` on, a multiple of `size`, which is a power of two: the halves are sums already.
  void add(int64_t begin, int64_t size) const {
    const int64_t half = begin + size / 2;
    T* to = parameters + begin * extent();
    combine_parameters<T>(extent(), to, to, parameters + half * extent(), T(1), nullptr);
    for (int64_t i = 0; i < numbers; i++) rates[begin * numbers + i] += rates[half * numbers + i];
  }
  // Those that end with the last of `done` groups, and lie within those from `begin` on.
  void add_last(int64_t begin, int64_t done) const {
    for (int64_t size = 2; done % size == 0 && begin <= done - size; size *= 2) add(done - size, size);
  }
};

// Tasks `first` and on, as many abreast as the network takes; their groups are numbered from `at` on.
template <class T>
struct Share {
  Task<T> planned;
  int64_t bytes, asking;  // that it needs, see plan_task
  int64_t first, tasks, at, groups;

  int64_t units() const { return tasks / planned.net.abreast; }

  // Sums that lie within the groups [begin, end) are added while they are in the cache.
  void run(const Sums<T>& sums, int64_t begin, int64_t end, char* memory) const {
    Task<T>& task = *place_task(planned, memory, nullptr, bytes);
    for (int64_t g = begin; g < end; g++) {
      const int64_t from = units() * g / groups, to = units() * (g + 1) / groups, group = at + g;
      for (int64_t u = from; u < to; u++)
        task.run(first + u * task.net.abreast, sums.theta(group), u == from, sums.rate_numbers(group),
                 sums.rate_rows(group));
      sums.add_last(at + begin, group + 1);
    }
  }
};

template <class T>
struct Work {
  const Machine& machine;
  Share<T> share, rest;  // rest: the odd task, where the others go two abreast
  Sums<T> sums;
  int64_t workers;       // each of which has some groups
  int64_t turns;         // or tasks that are adapted side by side, and take turns in front of the query set; 0: none
  char *const *memory, *rest_memory, *query_memory;

  int64_t first(int64_t worker) const { return share.groups * worker / workers; }

  static void some(void* context, int64_t begin, int64_t end) {
    const Work& w = *(const Work*)context;
    for (int64_t worker = begin; worker < end; worker++) {
      w.share.run(w.sums, w.first(worker), w.first(worker + 1), w.memory[worker]);
      // Where groups do not come out even, the first worker has fewer of them.
      if (worker == 0 && w.rest.tasks) w.rest.run(w.sums, 0, 1, w.rest_memory);
    }
  }
  // Sums that do not lie within the groups of a worker.
  void add_rest() const {
    if (!sums.extent() && !sums.numbers) return;
    for (int64_t size = 2; size < 2 * sums.groups; size *= 2)
      for (int64_t begin = 0, worker = 0; begin + size / 2 < sums.groups; begin += size) {
        while (first(worker + 1) <= begin) worker++;
        if (begin + size > first(worker + 1)) sums.add(begin, size);
      }
  }

  // A thread adapts a task each; all threads work on one task's query set after another; a thread each goes back through
  // the inner loop. The last tasks, if they are fewer than threads, are worked on by all of these throughout.
  struct Round {
    const Sums<T>& sums;
    Task<T>* const* tasks;
    int64_t first, count;

    static void start(void* context, int64_t begin, int64_t end) {
      const Round& r = *(const Round*)context;
      for (int64_t i = begin; i < end; i++) r.tasks[i]->start(r.first + i);
    }
    static void finish(void* context, int64_t begin, int64_t end) {
      const Round& r = *(const Round*)context;
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = r.first + i;
        r.tasks[i]->finish(t, r.sums.theta(t), true, r.sums.rate_numbers(t), r.sums.rate_rows(t));
      }
    }
  };
  void rounds() const {
    Task<T>* tasks[kMostWorkers];
    for (int64_t i = 0; i < turns; i++) tasks[i] = place_task(share.planned, memory[i], query_memory, share.bytes);
    const Crew all{machine.split, machine.threads};
    for (int64_t first = 0; first < share.tasks; first += turns) {
      Round round{sums, tasks, first, smaller(turns, share.tasks - first)};
      const bool few = round.count < turns;
      auto each = [&](void (*part)(void*, int64_t, int64_t)) {
        for (int64_t i = 0; i < round.count; i++) tasks[i]->crew = few ? all : Crew{};
        if (few)
          part(&round, 0, round.count);
        else
          machine.split(round.count, 1, &round, part);
      };
      each(&Round::start);
      for (int64_t i = 0; i < round.count; i++) {
        tasks[i]->crew = all;
        tasks[i]->ask(first + i);
      }
      each(&Round::finish);
      for (int64_t i = 0; i < round.count; i++) sums.add_last(0, first + i + 1);
    }
  }
};

// Tasks two abreast fill vectors that the channels of one would not. Samples that are left out would have to be the same
// of both.
template <class T>
bool goes_abreast(const Call<T>& call) {
  return sizeof(T) == 4 && call.net->pairs && call.mode == kMeta && call.reduce && call.shared &&
         call.tasks >= kManyTasks && !call.support.weight && !call.query.weight;
}

template <class T>
void run(const Call<T>& call, const Machine& machine) {
  const Network& net = goes_abreast(call) ? *call.net->pairs : *call.net;
  const int64_t odd = call.tasks % net.abreast, threads = machine.threads;
  auto plan = [&](const Network& of, int64_t first, int64_t tasks, int64_t at, int64_t groups) {
    int64_t bytes = 0, asking = 0;
    const Task<T> planned = plan_task<T>(call, of, machine, bytes, asking);
    return Share<T>{planned, bytes, asking, first, tasks, at, groups};
  };
  const int64_t rows = call.to_rates && call.per_parameter ? call.rate_rows : 0;
  Sums<T> sums{call.reduce, rows, call.to_rates && !rows ? call.rate_rows : 0, call.tasks / net.abreast,
               call.net->adapted};
  constexpr int64_t kSums = int64_t(8) << 20;  // bytes
  if (sums.extent())
    sums.groups = smaller(sums.groups, larger<int64_t>(8, kSums / (sums.extent() * int64_t(sizeof(T)))));
  Work<T> work{machine, plan(net, 0, call.tasks - odd, 0, sums.groups),
               plan(*call.net, call.tasks - odd, odd, sums.groups, 1), sums, 1};
  Share<T>& share = work.share;
  work.sums.groups += odd;

  const int64_t units = share.units(), samples = larger(call.support.samples, call.query.samples);
  const bool small = net.work <= Crew::kWorthwhile / 2 / larger<int64_t>(1, samples);  // no rule would be shared out
  const bool even = units >= 4 * threads || units % threads == 0 || small;
  if (even && share.bytes + share.asking <= kSideBySide) {
    work.workers = smaller(smaller(threads, kMostWorkers), share.groups);
  } else if (threads > 1) {
    const bool fits = share.bytes + share.asking / threads <= kSideBySide && threads <= kMostWorkers;
    if (call.mode == kMeta && fits && share.groups == call.tasks && call.tasks >= threads)
      work.turns = threads;
    else
      share.planned.crew = work.rest.planned.crew = {machine.split, threads};
  }

  enum Part { kAll, kWithoutQuery, kQuery };  // of what a task needs
  auto take = [&](const Share<T>& of, Part part) {
    const int64_t key[8] = {of.planned.net.serial, 8 * part + call.mode, call.support.samples, call.query.samples,
                            call.steps, share.planned.kept_frames, rows ? rows : call.per_parameter,
                            share.planned.many_gradients()};
    return (char*)machine.take((part == kQuery ? 0 : of.bytes) + (part == kWithoutQuery ? 0 : of.asking), key);
  };
  char* memory[kMostWorkers];
  const int64_t places = larger(work.workers, work.turns);
  for (int64_t w = 0; w < places; w++) memory[w] = take(share, work.turns ? kWithoutQuery : kAll);
  work.memory = memory;
  work.query_memory = work.turns ? take(share, kQuery) : nullptr;
  work.rest_memory = odd ? take(work.rest, kAll) : nullptr;
  const int64_t none[8] = {-1};
  Bump count{nullptr, 0};
  work.sums.lay_out(count);
  Bump bump{(char*)machine.take(count.used, none), 0};
  work.sums.lay_out(bump);
  work.sums.clear();

  if (work.turns)
    work.rounds();
  else if (work.workers > 1)
    machine.split(work.workers, 1, &work, &Work<T>::some);
  else
    Work<T>::some(&work, 0, 1);

  work.add_rest();
  auto unload = [&](int64_t which, T* to) {
    for (int64_t i = 0; i < net.parameters; i++) to[i] = 0;
    from_engine<T>(*call.net, work.sums.parameters + which * call.net->adapted, to);
  };
  if (call.reduce) unload(0, call.to_theta);
  for (int64_t i = 0; i < sums.numbers; i++) call.to_rates[i] = T(work.sums.rates[i]);
  for (int64_t r = 0; r < rows; r++) unload((call.reduce ? 1 : 0) + r, call.to_rates + r * net.parameters);
  machine.give(bump.base);
  machine.give(work.rest_memory);
  machine.give(work.query_memory);
  for (int64_t w = 0; w < places; w++) machine.give(memory[w]);
}
