// The keeper's half of stores and loads: slots that are handed to the ranks' workers, who copy.
#include "engine_impl.h"

namespace kvtier {

Result<Grant> EngineImpl::make_grant(const std::shared_ptr<Operation>& operation, std::uint32_t num_parts) {
  Grant grant;
  grant.ticket = operation->ticket;
  if (operation->entries.empty()) {
    finish_operation(operation);
    return grant;
  }
  operation->ticket->set_outcomes(operation->outcomes);  // what is known already
  take_off(*operation);
  operation->parts_left = num_parts;
  grant.blocks = operation->blocks;
  grant.slots = operation->slots;
  MutexLock lock(mutex_);
  operation->grant_id = grant.id = next_grant_++;
  grants_.emplace(grant.id, operation);
  return grant;
}

Result<Grant> EngineImpl::grant_store(GroupId group, const StoreRequest& request, std::uint32_t num_parts) {
  KVTIER_RETURN_IF_ERROR(check_grant(group, num_parts, request.keys.size(), request.first_block));
  const std::shared_ptr<Operation> operation = make_operation(Direction::store, group, request.keys.size());
  const Call call(*this);
  return finished_if_thrown(operation, [&]() -> Result<Grant> {
    KVTIER_RETURN_IF_ERROR(begin_store(*operation, request));
    return make_grant(operation, num_parts);
  });
}

Result<Grant> EngineImpl::grant_load(GroupId group, const LoadRequest& request, std::uint32_t num_parts) {
  KVTIER_RETURN_IF_ERROR(check_grant(group, num_parts, request.keys.size(), request.first_block));
  const std::shared_ptr<Operation> operation = make_operation(Direction::load, group, request.keys.size());
  const Call call(*this);
  return finished_if_thrown(operation, [&]() -> Result<Grant> {
    // Nothing expires here: a block whose time ends between a lease and its grant was promised.
    KVTIER_RETURN_IF_ERROR(begin_load(operation, request, nullptr));
    return make_grant(operation, num_parts);
  });
}

Status EngineImpl::check_grant(GroupId group, std::uint32_t num_parts, std::size_t num_keys,
                               std::uint32_t first_block) const {
  if (raw(group) >= config_.groups.size()) {
    return Status::invalid_argument("group is " + std::to_string(raw(group)) + "; allowed: 0 to " +
                                    std::to_string(config_.groups.size() - 1));
  }
  if (num_parts == 0) return Status::invalid_argument("num_parts is 0; allowed: 1 or more");
  return check_depth(num_keys, first_block);
}

Status EngineImpl::finish_part(std::uint64_t grant_id, const TransferOutcome& outcome) {
  std::shared_ptr<Operation> operation;
  {
    MutexLock lock(mutex_);
    const auto found = grants_.find(grant_id);
    if (found == grants_.end()) {
      return Status::invalid_argument("grant " + std::to_string(grant_id) + " is not known or is over");
    }
    Operation& running = *found->second;
    if (running.outcome.status) running.outcome.status = outcome.status;
    running.outcome.drained = running.outcome.drained && outcome.drained;
    if (!running.outcome.drained && running.outcome.status) {
      running.outcome.status = Status::device("a rank cannot prove that its copies are over");
    }
    if (--running.parts_left > 0) return Status::ok();
    operation = found->second;
    grants_.erase(found);
  }
  finish_operation(operation);
  return Status::ok();
}

}  // namespace kvtier
